"""Answers are right, not only present: one photograph through a real server, against the library called directly.

Every reference is made with the library alone (torchvision, ultralytics, and for RIDCP its network), from the same
weights and the same bytes; nothing of the serving path is used for it.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from tests.processes.tools import SRC
from torchvision import transforms

from corun import registry, torch_tools
from corun.errors import RunFault
from corun.registry import DataOptions
from corun.testing.ask import Asker
from corun.wire import Address, Status, connect
from corun.wire.channel import Channel
from corun.wire.messages import Load

Ask = Callable[..., bytes]
LOAD_S = 300.0
SEED = 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One torch thread, as the server has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """`ask(model, payload, **options)`: LOAD the model into one server process, send the payload, return the reply."""
    directory = tmp_path_factory.mktemp("server")
    address = Address("unix", str(directory / "s"))
    argv = [sys.executable, str(SRC / "server.py"), "--address", str(address), "--device", "cpu", "--threads", "1"]
    with open(directory / "log", "w") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        channel = Channel(connect(address, 180.0, retry=True))

        def one(model: str, payload: bytes, **options: Any) -> bytes:
            channel.request(Load(model, options), LOAD_S)
            with Asker(address) as asker:
                answer = asker.ask(payload, LOAD_S)
            assert answer.status == Status.OK, answer.payload
            return answer.payload

        yield one
        channel.close()
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def photograph() -> bytes:
    """A crop of a real photograph, as JPEG."""
    return registry.request_payloads("sample", DataOptions(image_size=224, count=1, seed=SEED))[0].data


def _picture(payload: bytes) -> Image.Image:
    return Image.open(io.BytesIO(payload)).convert("RGB")


def _square(payload: bytes, side: int) -> torch.Tensor:
    """The whole photograph at side x side, normalised, by torchvision's transforms: (1, 3, side, side)."""
    steps = [transforms.Resize((side, side)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose(steps)(_picture(payload))[None]


def _calibrated(network: Any, batch: torch.Tensor) -> Any:
    """BatchNorm statistics of the photograph, so that random weights tell its parts from each other."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(torch.cat((batch, batch.flip(3))))
    return network.eval()


def _top_five(network: Any, batch: torch.Tensor) -> tuple[list[int], np.ndarray]:
    """Classes by logit and their probabilities in float64, as a network with random weights has them close together."""
    with torch.inference_mode():
        logits = network(batch)[0]
    best = logits.topk(5).indices
    return best.tolist(), logits.double().softmax(0)[best].numpy()


def test_classes_are_torchvisions(ask: Ask, photograph: bytes, tmp_path: Path) -> None:
    """mobilenet_v3_small: the five classes and probabilities of the library's preset, by seed and from a file."""
    read_reply = registry.load_plugin("models", "cnn").read_reply
    batch = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT.transforms()(_picture(photograph))[None]
    torch.manual_seed(SEED)
    network = torchvision.models.mobilenet_v3_small(weights=None).eval()
    classes, probabilities = _top_five(network, batch)
    rows = read_reply(ask("mobilenet_v3_small", photograph, seed=SEED))
    assert [row[0] for row in rows] == classes
    np.testing.assert_allclose([row[1] for row in rows], probabilities, rtol=1e-5)
    assert read_reply(ask("mobilenet_v3_small", photograph, seed=SEED + 1)) != rows, "another seed, another network"

    network = _calibrated(network, batch)
    network.classifier[-1].weight.data.mul_(300)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    classes, probabilities = _top_five(network, batch)
    assert probabilities[0] > 1.2 * probabilities[4], "five equal classes would prove little"
    rows = read_reply(ask("mobilenet_v3_small", photograph, weights=str(tmp_path / "weights.pth")))
    assert [row[0] for row in rows] == classes
    np.testing.assert_allclose([row[1] for row in rows], probabilities, rtol=1e-4)


def test_a_class_map_is_torchvisions(ask: Ask, photograph: bytes, tmp_path: Path) -> None:
    """deeplabv3_mobilenet_v3_large at 64 px, weights from a file: the arg max of the library's scores, cell by cell."""
    batch = _square(photograph, 64)
    torch.manual_seed(SEED)
    name = "deeplabv3_mobilenet_v3_large"
    network = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    network = _calibrated(network, batch)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    with torch.inference_mode():
        scores = network(batch)["out"][0]

    reply = ask(name, photograph, image_size=64, weights=str(tmp_path / "weights.pth"))
    cells, classes = registry.load_plugin("models", "deeplab").decode_class_map(reply)
    assert classes == 21
    assert len(np.unique(cells)) > 2, "a map of one class would prove little"
    best, second = scores.topk(2, dim=0).values
    clear = ((best - second) > 1e-3).numpy()
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(cells[clear], scores.argmax(0).numpy()[clear])


PREDICT = """
import os, sys
picture, out, cache = sys.argv[1:]
os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false", YOLO_CONFIG_DIR=cache)
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import resize, to_tensor
from ultralytics import YOLO

torch.manual_seed(5)
model = YOLO("yolov5n.yaml")
network = model.model
for module in network.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.momentum = None
photograph = Image.open(picture).convert("RGB")
square = to_tensor(resize(photograph, (128, 128)))[None]
with torch.no_grad():
    network.train()(torch.cat((square, square.flip(3))))
    for sides, scores in zip(network.model[-1].cv2, network.model[-1].cv3):
        sides[-1].weight.normal_(0, 0.02)
        scores[-1].weight.normal_(0, 0.1)
        scores[-1].bias.fill_(-3)
network.eval()
torch.save(network.state_dict(), out + ".pth")
(result,) = model.predict(
    np.ascontiguousarray(np.asarray(photograph)[..., ::-1]), imgsz=128, rect=False, conf=0.05, iou=0.45, max_det=50,
    device="cpu", verbose=False, save=False,
)
np.save(out + ".npy", result.boxes.data.numpy())
"""


def test_boxes_are_ultralytics(ask: Ask, photograph: bytes, tmp_path: Path) -> None:
    """yolov5n at 128 px, weights from a file: boxes, scores and classes of the package's own predict, in a process."""
    (tmp_path / "photograph.jpg").write_bytes(photograph)
    argv = [sys.executable, "-c", PREDICT, "photograph.jpg", str(tmp_path / "state"), str(tmp_path / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = np.load(tmp_path / "state.npy")
    assert len(expected) > 5

    extra = {"conf": 0.05, "iou": 0.45, "max_det": 50}
    reply = ask("yolov5n", photograph, image_size=128, weights=str(tmp_path / "state.pth"), extra=extra)
    rows = registry.load_plugin("models", "yolo").decode_detections(reply)
    found = np.stack([rows[name] for name in ("x1", "y1", "x2", "y2", "score")], axis=1)
    np.testing.assert_allclose(found, expected[:, :5], atol=5e-3)
    np.testing.assert_array_equal(rows["class"], expected[:, 5])


def test_a_dehazed_picture_is_the_networks(ask: Ask, photograph: bytes, tmp_path: Path) -> None:
    """RIDCP_dehazing_tiny at 64 px, weights from a file: mirrored to 96, run, cropped, rounded to 8 bits, by hand."""
    net = registry.load_plugin("models", "_ridcp")
    with torch_tools.seeded(SEED):
        network = net.Ridcp(net.TINY).eval()
        for name, value in network.named_parameters():
            if "offset" in name:
                value.data.normal_(0, 0.02)
        network.head.weight.data.mul_(0.1)
        network.head.bias.data.fill_(0.5)
    torch.save({"params": net.to_upstream(network)}, tmp_path / "ridcp.pth")
    levels = np.asarray(_picture(photograph).resize((64, 64), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    padded = np.pad(levels, ((0, 32), (0, 32), (0, 0)), mode="symmetric")
    with torch.inference_mode():
        restored = network(torch.from_numpy(padded).permute(2, 0, 1)[None]).image[0, :, :64, :64]
    expected = restored.clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()
    assert expected.std() > 5, "a flat picture would prove little"

    reply = ask("RIDCP_dehazing_tiny", photograph, image_size=64, weights=str(tmp_path / "ridcp.pth"))
    assert reply[:4] == b"\x89PNG"
    found = np.asarray(_picture(reply), dtype=np.float32)
    assert found.shape == (64, 64, 3)
    assert np.abs(found - expected).max() <= 1


def test_a_failed_load_keeps_the_model(ask: Ask, photograph: bytes) -> None:
    """A LOAD that cannot be done is answered with its reason, and the model that was there goes on answering."""
    before = ask("mobilenet_v3_small", photograph, image_size=64, seed=SEED)
    with pytest.raises(RunFault, match="did you mean"):
        ask("mobilenet_v3_smal", photograph)
    assert ask("mobilenet_v3_small", photograph, image_size=64, seed=SEED) == before
