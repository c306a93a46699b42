"""The demo: two small services at 22 requests a second each, beside a training job on handwritten digits."""

from __future__ import annotations

from typing import Any, Final

DEMO: Final[dict[str, Any]] = {
    "train": [{"arch": "resnet18", "data": "digits", "batch_size": 32, "image_size": 32, "lr": 0.02}],
    "infer": [
        [
            {"arch": "mobilenet_v3_small", "rate": 22, "data": "sample"},
            {"arch": "shufflenet_v2_x1_0", "rate": 22, "data": "sample"},
        ]
    ],
    "duration_s": {"alone": 32, "train": 8, "corun": 32},
}
