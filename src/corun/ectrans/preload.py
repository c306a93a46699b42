"""What a fork server imports before it forks: everything a worker would, and no thread and no model of its own."""

import torch  # noqa: F401
import transformers.models.marian.modeling_marian
import transformers.models.t5.modeling_t5  # noqa: F401

import corun.ectrans.decode
import corun.ectrans.parts
import corun.ectrans.workers  # noqa: F401
