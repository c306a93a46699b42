# The project in a container, for `tasks.py` replicas (runtime docker) and for running any of its programs:
#
#   docker build -t corun .                                          with CUDA, as PyPI's torch has it (large)
#   docker build -t corun --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .        CPU only
#   docker run --rm --network host corun python src/server.py --model resnet18 --port 54100
#
# Models, data sets and results stay outside: mount them, e.g. -v ~/.cache/torch:/home/corun/.cache/torch
FROM python:3.11-slim

ARG TORCH_INDEX=""

WORKDIR /app
RUN useradd --create-home corun && mkdir result && chown corun result

COPY pyproject.toml README.md LICENSE ./
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir torch torchvision --index-url "$TORCH_INDEX"; fi \
 && mkdir -p src/corun && touch src/corun/__init__.py \
 && pip install --no-cache-dir . \
 && pip uninstall --yes corun

COPY src src
COPY models models
COPY datasets datasets
COPY config.json device.json ./

ENV PYTHONPATH=/app/src PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER corun
EXPOSE 54100

HEALTHCHECK --interval=5s --timeout=3s --start-period=120s --retries=3 \
  CMD ["python", "-m", "corun.tasks.health"]

CMD ["python", "src/server.py", "--host", "0.0.0.0", "--port", "54100"]
