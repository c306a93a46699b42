"""YOLOv5u: the same boxes as the package's own predict, no trace of its import, and no file it should not open."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corun import images, registry, torch_tools
from corun.errors import InputError
from corun.registry import ModelOptions

yolo = registry.load_plugin("models", "yolo")
pytestmark = pytest.mark.timeout(600)  # a guard against hanging, wide enough for a machine with ten times the work
SOURCE = Path(registry.__file__).resolve().parents[1]
PARAMS = {"yolov5n": 2_654_816, "yolov5s": 9_153_152}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """One torch thread, restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lively() -> dict[str, torch.Tensor]:
    """The state of a yolov5n that finds boxes: BatchNorm calibrated on the requests, a head with spread scores."""
    network = yolo.build("yolov5n", 80, seed=3)
    squares = [yolo.letterbox(images.decode_rgb(payload), 160)[0] for payload in made_requests()]
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad(), torch_tools.seeded(3):
        network.train()(torch.stack([torch.from_numpy(images.scaled(square)) for square in squares]))
        for sides, scores in zip(network.model[-1].cv2, network.model[-1].cv3, strict=True):
            sides[-1].weight.normal_(0, 0.02)
            scores[-1].weight.normal_(0, 0.1)
            scores[-1].bias.fill_(-3)
    return network.state_dict()


def child(code: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """Run `code` in a fresh Python, without what the package's import left here; return its last line."""
    clean = {k: v for k, v in os.environ.items() if k not in (*yolo.ENVIRONMENT, "YOLO_CONFIG_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**clean, "PYTHONPATH": str(SOURCE), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def saved(state: Any, path: Path) -> str:
    torch.save(state, path)
    return str(path)


def made_requests() -> list[bytes]:
    """A wide, a tall and a small picture, so that every branch of the letterbox is used."""
    sizes = ((90, 260), (233, 121), (40, 40))
    return [images.encode_jpeg(images.made_image(i, h, w), 95) for i, (h, w) in enumerate(sizes)]


def answers(servable: Any, payloads: list[bytes]) -> list[np.ndarray]:
    """All stages, as the engine calls them."""
    batch = servable.to_device(servable.preprocess([servable.decode(payload) for payload in payloads]))
    replies = servable.postprocess(servable.to_host(servable.forward(batch)), len(payloads))
    return [yolo.decode_detections(reply) for reply in replies]


# --- Boxes ------------------------------------------------------------------------------------------------------

PREDICT = """
import os, sys
import numpy as np
weights, pictures, out, cache = sys.argv[1:]
os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false", YOLO_CONFIG_DIR=cache)
import torch
from ultralytics import YOLO
torch.set_num_threads(1)
model = YOLO("yolov5n.yaml")
model.model.load_state_dict(torch.load(weights))
found = {}
for name, picture in np.load(pictures).items():
    (result,) = model.predict(
        np.ascontiguousarray(picture[..., ::-1]), imgsz=160, rect=False, conf=0.05, iou=0.45, max_det=50,
        device="cpu", verbose=False, save=False,
    )
    found[name] = result.boxes.data.numpy()
np.savez(out, **found)
print("done")
"""


def test_boxes_equal_predict(lively: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """On the same weights and pictures, boxes, scores and classes are those of the package's own predict."""
    weights = saved(lively, tmp_path / "state.pt")
    options = ModelOptions(weights=weights, image_size=160, extra={"conf": 0.05, "max_det": 50})
    payloads = made_requests()
    ours = answers(yolo.serve("yolov5n", options), payloads)
    np.savez(tmp_path / "in.npz", **{str(i): images.decode_rgb(p) for i, p in enumerate(payloads)})
    child(PREDICT, weights, str(tmp_path / "in.npz"), str(tmp_path / "out.npz"), str(tmp_path))
    theirs = np.load(tmp_path / "out.npz")
    assert sum(len(rows) for rows in ours) > 20
    for index, rows in enumerate(ours):
        corners = np.stack([rows[name] for name in ("x1", "y1", "x2", "y2", "score")], axis=1)
        np.testing.assert_allclose(corners, theirs[str(index)][:, :5], atol=5e-3)
        np.testing.assert_array_equal(rows["class"], theirs[str(index)][:, 5])


def test_a_batch_answers_as_singles_do(lively: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """A picture's boxes do not depend on its batch mates."""
    options = ModelOptions(weights=saved(lively, tmp_path / "s.pt"), image_size=96, extra={"conf": 0.05})
    servable = yolo.serve("yolov5n", options)
    payloads = made_requests()
    for together, payload in zip(answers(servable, payloads), payloads, strict=True):
        (alone,) = answers(servable, [payload])
        np.testing.assert_array_equal(together["class"], alone["class"])
        np.testing.assert_allclose(together["x1"], alone["x1"], atol=1e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_decodes_in_float32(lively: dict[str, torch.Tensor], tmp_path: Path, precision: str) -> None:
    """Boxes of a 16-bit network are float32 values that its own type, with steps of pixels, could not hold."""
    options = ModelOptions(weights=saved(lively, tmp_path / "s.pt"), image_size=128, precision=precision)
    servable = yolo.serve("yolov5n", options)
    predictions = servable.forward(servable.to_device(servable.preprocess([images.made_image(7, 128, 128)]))).tensor
    assert predictions.dtype == torch.float32
    boxes = predictions[:, :4]
    assert (boxes.to(servable.dtype).float() != boxes).float().mean() > 0.9


def test_own_decoding_equals_the_networks(lively: dict[str, torch.Tensor]) -> None:
    """`decode_heads` is the network's own decoding, done in float32."""
    network = yolo.build("yolov5n", 80, seed=0)
    network.load_state_dict(lively)
    with torch.inference_mode():
        pictures = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(4))
        decoded, heads = network.eval()(pictures)
        ours = yolo.decode_heads(heads, network.stride.tolist())
    torch.testing.assert_close(ours, decoded, rtol=1e-4, atol=1e-3)


def test_random_weights_reply_with_no_boxes() -> None:
    """Random weights find nothing above 0.25: a reply of count 0, not an error; same seed, same network."""
    servable = yolo.serve("yolov5n", ModelOptions(image_size=64, seed=5))
    assert [len(rows) for rows in answers(servable, [servable.example()])] == [0]
    assert servable.info.params == PARAMS["yolov5n"]
    assert (servable.info.weights, servable.info.image_size, servable.info.task) == ("random", 64, "detection")
    twin = yolo.serve("yolov5n", ModelOptions(image_size=64, seed=5))
    assert torch.equal(servable.module.model[0].conv.weight, twin.module.model[0].conv.weight)


# --- Geometry and suppression -----------------------------------------------------------------------------------


@given(
    height=st.integers(1, 400), width=st.integers(1, 400), size=st.sampled_from((32, 64, 224)), seed=st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_letterbox_equals_the_packages(height: int, width: int, size: int, seed: int) -> None:
    """The square is bit for bit that of the package's LetterBox, whatever the shape of the picture."""
    yolo.library()
    from ultralytics.data.augment import LetterBox

    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    square, _ = yolo.letterbox(picture, size)
    np.testing.assert_array_equal(square, LetterBox((size, size))(image=picture))


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), data=st.data())
@settings(max_examples=100, deadline=None)
def test_corners_come_back(height: int, width: int, data: st.DataObject) -> None:
    """A corner mapped into the square and back is where it was, and stays inside the picture."""
    scale = min(640 / height, 640 / width)
    new_width, new_height = max(round(width * scale), 1), max(round(height * scale), 1)
    fit = yolo.Fit(width, height, new_width / width, new_height / height, (640 - new_width) // 2, 3)
    x, y = data.draw(st.floats(0, width)), data.draw(st.floats(0, height))
    inside = torch.tensor([[x * fit.gain_x + fit.left, y * fit.gain_y + fit.top, 1e6, -1e6]])
    left, top, right, bottom = fit.back(inside)[0].tolist()
    assert left == pytest.approx(x, abs=max(0.01, width * 1e-5))
    assert top == pytest.approx(y, abs=max(0.01, height * 1e-5))
    assert (right, bottom) == (width, 0)


@given(count=st.integers(0, 40), classes=st.integers(1, 3), seed=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_suppression_without_the_compiled_operator(count: int, classes: int, seed: int) -> None:
    """The torch fallback keeps the same boxes in the same order as torchvision's operator."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 20
    boxes = torch.cat((corners, corners + 1 + torch.rand(count, 2, generator=generator) * 20), 1)
    scores = torch.rand(count, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator).float()
    expected = yolo.suppress(boxes, scores, labels, 0.45)
    assert torch.equal(yolo.suppress_in_torch(boxes, scores, labels, 0.45), expected)


@given(rows=st.lists(st.tuples(*[st.floats(0, 1e4, width=32)] * 5, st.integers(0, 79)), max_size=20))
def test_replies_come_back(rows: list[tuple[float, ...]]) -> None:
    """A reply decodes to the very detections it was made of, at 24 bytes each after a count of 4."""
    detections = np.array(rows, yolo.DETECTION)
    payload = yolo.encode_detections(detections)
    assert len(payload) == 4 + 24 * len(rows)
    np.testing.assert_array_equal(yolo.decode_detections(payload), detections)


@pytest.mark.parametrize("payload", [b"", b"\0\0", b"\1\0\0\0", b"\0\0\0\0\0"])
def test_replies_of_a_wrong_length_are_refused(payload: bytes) -> None:
    """A reply whose length is not what its count says is a ValueError."""
    with pytest.raises(ValueError, match="detection reply"):
        yolo.decode_detections(payload)


# --- The import -------------------------------------------------------------------------------------------------

IMPORT = """
import json, os, socket, subprocess, sys
calls = []
def refuse(what):
    def call(*arguments, **keywords):
        calls.append(what)
        raise OSError("no network in this test")
    return call
socket.socket.connect = refuse("connect")
socket.socket.sendto = refuse("sendto")
socket.getaddrinfo = refuse("getaddrinfo")
import numpy, torch
from PIL import Image
torch.set_num_threads(3)
before = dict(os.environ)
kept = (Image.open, torch.save, torch.get_num_threads(), numpy.get_printoptions())
from corun import registry
yolo = registry.load_plugin("models", "yolo")
servable = yolo.serve("yolov5n", registry.ModelOptions(image_size=64))
batch = servable.preprocess([servable.decode(servable.example())])
servable.postprocess(servable.to_host(servable.forward(servable.to_device(batch))), 1)
try:
    servable.decode(b"not a picture")
except ValueError as error:
    corrupt = str(error)
import ultralytics.utils
print(json.dumps({
    "changed": {k: [before.get(k), os.environ.get(k)] for k in set(before) | set(os.environ)
                if before.get(k) != os.environ.get(k)},
    "kept": kept == (Image.open, torch.save, torch.get_num_threads(), numpy.get_printoptions()),
    "calls": calls, "corrupt": corrupt, "online": ultralytics.utils.ONLINE,
    "sync": ultralytics.utils.SETTINGS["sync"], "settings": str(ultralytics.utils.SETTINGS.file),
    "heavy": sorted({"pandas", "matplotlib", "pyarrow", "pydantic", "ultralytics.engine"} & set(sys.modules)),
}))
"""


@pytest.mark.parametrize("omp", [None, "5"])
def test_importing_leaves_no_trace(tmp_path: Path, omp: str | None) -> None:
    """Building and serving changes no thread count, no variable but YOLO's own, and calls no network.

    With the package's patch of `PIL.Image.open` left in place, a corrupt picture would be a missing module
    (after an attempt to install it) and not the ValueError a server answers with.
    """
    environment = {"CORUN_CACHE": str(tmp_path), "HOME": str(tmp_path / "home")}
    environment |= {"OMP_NUM_THREADS": omp} if omp else {"OMP_NUM_THREADS": ""}
    seen = json.loads(child(IMPORT, environment=environment))
    assert set(seen["changed"]) == {*yolo.ENVIRONMENT, "YOLO_CONFIG_DIR"}
    assert seen["kept"]
    assert seen["calls"] == []
    assert (seen["online"], seen["sync"], seen["heavy"]) == (False, False, [])
    assert Path(seen["settings"]).is_relative_to(tmp_path / "ultralytics")
    assert not (tmp_path / "home").exists()
    assert "not a readable image" in seen["corrupt"]


# --- Weight files -----------------------------------------------------------------------------------------------


def checkpoint_of(state: dict[str, torch.Tensor], name: str = "yolov5n", fused: bool = False) -> dict[str, Any]:
    """A checkpoint as the package saves one: the whole network, pickled (by the package, in half precision)."""
    network = yolo.build(name, 80, seed=0)
    network.load_state_dict(state)
    if fused:
        network.eval().fuse(verbose=False)
    return {"ema": None, "model": network, "modelopt": None, "date": "2026-01-01", "version": "8.4.190"}


def test_a_checkpoint_and_its_state_dict_are_the_same_network(
    lively: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """A full v5u checkpoint and a bare v5u state dict both load, into equal networks, labelled by their hash."""
    half = {k: v.half().float() if v.is_floating_point() else v for k, v in lively.items()}
    checkpoint = checkpoint_of(lively)
    checkpoint["model"].half()
    whole = yolo.network_of("yolov5n", ModelOptions(weights=saved(checkpoint, tmp_path / "w.pt")))
    bare = yolo.network_of("yolov5n", ModelOptions(weights=saved(half, tmp_path / "b.pt")))
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, bare[0].state_dict()[name]), name
    assert whole[2].startswith("sha256:")
    assert whole[2].endswith("w.pt")


def test_a_folded_checkpoint_serves_but_does_not_train(lively: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """A checkpoint saved after predict has its BatchNorm folded in: the boxes are the same, training is refused."""
    size = {"image_size": 64}
    folded = ModelOptions(weights=saved(checkpoint_of(lively, fused=True), tmp_path / "f.pt"), **size)
    plain = ModelOptions(weights=saved(checkpoint_of(lively), tmp_path / "p.pt"), **size)
    picture = [images.made_image(1, 64, 64)]
    ours, theirs = (yolo.serve("yolov5n", options) for options in (folded, plain))
    outputs = [model.forward(model.to_device(model.preprocess(picture))).tensor for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=0.01)
    assert ours.info.params == theirs.info.params
    with pytest.raises(InputError, match="folded"):
        yolo.train("yolov5n", folded)


def test_a_name_the_package_would_rewrite_is_opened_as_given(
    lively: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`yolov5n.pt` is loaded, not the `yolov5nu.pt` beside it, which the package would take without a word."""
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint_of(lively), "yolov5n.pt")
    torch.save(checkpoint_of(yolo.build("yolov5n", 80, seed=9).state_dict()), "yolov5nu.pt")
    network, _, _ = yolo.network_of("yolov5n", ModelOptions(weights="yolov5n.pt"))
    assert torch.equal(network.model[0].conv.weight, lively["model.0.conv.weight"])


def test_a_recipe_in_the_working_directory_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is built from the package's own description, not from a `yolov5n.yaml` that lies around."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yolov5n.yaml").write_text("nc: 1\n")
    assert sum(p.numel() for p in yolo.build("yolov5n", 80, seed=0).parameters()) == PARAMS["yolov5n"]


def original_pickle(monkeypatch: pytest.MonkeyPatch, path: Path) -> str:
    """A file made to the shape of an original yolov5n.pt: a pickled models.yolo.DetectionModel."""
    modules = {name: types.ModuleType(name) for name in ("models", "models.common", "models.yolo")}
    conv = type("Conv", (torch.nn.Module,), {"__module__": "models.common"})
    network = type("DetectionModel", (torch.nn.Module,), {"__module__": "models.yolo"})
    modules["models.common"].Conv, modules["models.yolo"].DetectionModel = conv, network
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        whole = network()
        whole.model = torch.nn.Sequential(conv())
        whole.model[0].conv = torch.nn.Conv2d(3, 16, 6)
        return saved({"epoch": -1, "model": whole.half(), "ema": None}, path)


def test_original_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle of the original YOLOv5 is named as what it is, with what to give instead."""
    path = original_pickle(monkeypatch, tmp_path / "yolov5n.pt")
    with pytest.raises(InputError, match="original-YOLOv5 pickle") as refusal:
        yolo.serve("yolov5n", ModelOptions(weights=path))
    assert path in str(refusal.value)
    assert "give a v5u checkpoint" in str(refusal.value)


@pytest.mark.parametrize("name", ["model.24.anchors", "model.24.m.0.weight", "model.model.24.m.2.bias"])
def test_original_state_dicts_are_refused(lively: dict[str, torch.Tensor], tmp_path: Path, name: str) -> None:
    """A bare state dict with the anchor-based head is refused with the same advice."""
    state = {**lively, name: torch.zeros(3, 3, 2)}
    with pytest.raises(InputError, match="original YOLOv5"):
        yolo.read_weights(Path(saved(state, tmp_path / "w.pt")))


class Runs:
    """An object whose unpickling would make a directory."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("beside", [True, False])
def test_code_in_a_file_does_not_run(lively: dict[str, torch.Tensor], tmp_path: Path, beside: bool) -> None:
    """A file that would run something is refused before it does, beside a real checkpoint or alone."""
    trap = tmp_path / "made"
    content = {**(checkpoint_of(lively) if beside else {}), "extra": Runs(str(trap))}
    with pytest.raises(InputError, match=r"would import \S*\.mkdir"):
        yolo.read_weights(Path(saved(content, tmp_path / "w.pt")))
    assert not trap.exists()


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    """Missing, empty, text and plain-pickle files are InputErrors that name the file."""
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"model": None, "epoch": 3}, tmp_path / "none.pt")
    for name in ("missing.pt", "empty.pt", "text.pt", "plain.pt", "none.pt"):
        with pytest.raises(InputError, match=name):
            yolo.read_weights(tmp_path / name)


def test_weights_of_another_size_are_named(lively: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Weights of yolov5n given to yolov5s: the error says which model they are of."""
    with pytest.raises(InputError, match="name the model yolov5n"):
        yolo.serve("yolov5s", ModelOptions(weights=saved(lively, tmp_path / "w.pt")))


def test_the_file_says_how_many_classes(tmp_path: Path) -> None:
    """The number of classes comes from the weights; a different num_classes is refused."""
    weights = saved(yolo.build("yolov5n", 7, seed=0).state_dict(), tmp_path / "w.pt")
    network, _, _ = yolo.network_of("yolov5n", ModelOptions(weights=weights))
    assert network.model[-1].nc == 7
    with pytest.raises(InputError, match="7 classes"):
        yolo.network_of("yolov5n", ModelOptions(weights=weights, num_classes=80))


def test_default_weights_are_not_downloaded() -> None:
    """Weights "default" say where to get the file and that its path is to be given."""
    with pytest.raises(InputError, match="not downloaded") as refusal:
        yolo.serve("yolov5n", ModelOptions(weights="default"))
    assert yolo.RELEASES in str(refusal.value)


# --- Options and rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 230, 31, -32])
def test_sizes_that_are_no_multiple_of_32_are_refused(size: int) -> None:
    """An image size that the network cannot take is an error that names one it can."""
    with pytest.raises(InputError, match="multiple of 32"):
        yolo.serve("yolov5n", ModelOptions(image_size=size))


def test_every_wrong_option_is_listed() -> None:
    """All problems of `extra` come at once, with a suggestion for a misspelt name."""
    with pytest.raises(InputError) as refusal:
        yolo.YoloOptions.of({"conff": 1, "iou": 2, "max_det": 0, "box": "a", "cls": -1})
    assert len(refusal.value.problems) == 5
    assert 'did you mean "conf"' in str(refusal.value)
    assert yolo.YoloOptions.of({"conf": 1, "max_det": 5.0}) == yolo.YoloOptions(conf=1.0, max_det=5)


def test_the_table_lists_five_networks() -> None:
    """The five sizes are offered, at 640 pixels unless asked otherwise, with their licence."""
    assert [row.name for row in yolo.MODELS] == [f"yolov5{size}" for size in "nsmlx"]
    assert {(row.image_size, row.task, row.code_licence) for row in yolo.MODELS} == {(640, "detection", "AGPL-3.0")}


def test_parameter_counts_are_the_published_ones() -> None:
    """yolov5s has the parameters and keys of the v5u network, not those of the original."""
    network = yolo.build("yolov5s", 80, seed=0)
    assert sum(p.numel() for p in network.parameters()) == PARAMS["yolov5s"]
    assert len(network.state_dict()) == 427


# --- Training ---------------------------------------------------------------------------------------------------


def made_batch(size: int = 64) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Bright rectangles of two classes on grey; one picture without any."""
    pictures = torch.full((4, 3, size, size), 0.4)
    targets = []
    for index in range(4):
        boxes = torch.tensor([[8.0 + 4 * index, 10.0, 40.0, 50.0]])[: index != 3]
        for x1, y1, x2, y2 in boxes.int().tolist():
            pictures[index, index % 2, y1:y2, x1:x2] = 1.0
        targets.append({"boxes": boxes, "labels": torch.full((len(boxes),), index % 2)})
    return pictures, targets


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_steps_reduce_the_loss(precision: str) -> None:
    """Some steps of SGD on made rectangles lower the detection loss, a scalar per image with a graph."""
    trainable = yolo.train("yolov5n", ModelOptions(image_size=64, num_classes=2, seed=1, precision=precision))
    optimizer = torch.optim.SGD(trainable.module.parameters(), lr=0.005, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = trainable.loss(made_batch())
        assert loss.shape == ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.7 * losses[0]


def test_a_trained_network_can_be_served(tmp_path: Path) -> None:
    """The state dict of a trained module is a weights file."""
    trainable = yolo.train("yolov5n", ModelOptions(image_size=64, num_classes=2))
    weights = saved(trainable.module.state_dict(), tmp_path / "w.pt")
    assert yolo.serve("yolov5n", ModelOptions(weights=weights, image_size=64)).info.weights.startswith("sha256:")


def test_the_loss_is_the_packages(lively: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The loss of a batch is the package's own, divided by the number of images, with its default gains."""
    weights = saved(lively, tmp_path / "w.pt")
    trainable = yolo.train("yolov5n", ModelOptions(weights=weights, image_size=64))
    trainable.module.eval()
    pictures, targets = made_batch()
    rows = [(i, t["labels"][0], *t["boxes"][0]) for i, t in enumerate(targets) if len(t["labels"])]
    image, label, x1, y1, x2, y2 = torch.tensor(rows).T
    batch = {
        "img": pictures,
        "batch_idx": image,
        "cls": label[:, None],
        "bboxes": torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), 1) / 64,
    }
    theirs, _ = trainable.module.loss(batch)
    torch.testing.assert_close(trainable.loss((pictures, targets)), theirs.sum() / 4)


def test_batches_that_cannot_train_are_explained() -> None:
    """Sides that do not fit, labels past the classes and one picture of 32 pixels are InputErrors."""
    trainable = yolo.train("yolov5n", ModelOptions(image_size=64, num_classes=2))
    pictures, targets = made_batch()
    with pytest.raises(InputError, match="multiples of 32"):
        trainable.loss((pictures[..., :40], targets))
    targets[0]["labels"] += 5
    with pytest.raises(InputError, match="label 5"):
        trainable.loss((pictures, targets))
    small = yolo.train("yolov5n", ModelOptions(image_size=32, num_classes=2))
    assert (trainable.min_batch, small.min_batch) == (1, 2)
    with pytest.raises(InputError, match="BatchNorm"):
        small.loss((torch.rand(1, 3, 32, 32), made_batch()[1][3:]))


def test_a_batch_without_boxes_has_a_loss() -> None:
    """Pictures without any box still train: the class scores go down."""
    trainable = yolo.train("yolov5n", ModelOptions(image_size=64, num_classes=2))
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    loss = trainable.loss((torch.rand(2, 3, 64, 64), [empty, dict(empty)]))
    loss.backward()
    assert loss.item() > 0
