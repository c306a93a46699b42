"""ChatGLM2: one base network, a LoRA adapter that answers and one that learns."""
