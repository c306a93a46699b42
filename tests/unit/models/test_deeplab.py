"""DeepLabV3: the same maps as torchvision's own model, maps that survive the wire, and training that explains itself."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from torchvision import transforms

from corun import images, registry, torch_tools
from corun.errors import InputError
from corun.registry import ModelOptions

pytestmark = pytest.mark.timeout(600)  # a guard against hanging, wide enough for a machine with ten times the work
deeplab = registry.load_plugin("models", "deeplab")
SMALL = "deeplabv3_mobilenet_v3_large"
SIZE = 64
PARAMS = {"deeplabv3_resnet50": 39_638_869, "deeplabv3_resnet101": 58_630_997, SMALL: 11_025_477}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """One torch thread, restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made_pictures() -> list[images.Rgb]:
    """A wide, a tall and a square picture."""
    return [images.made_image(i, h, w) for i, (h, w) in enumerate(((50, 120), (90, 70), (64, 64)))]


def lively(name: str, **options: Any) -> Any:
    """torchvision's own network with BatchNorm calibrated on made pictures, so that its maps have several classes."""
    with torch_tools.seeded(1):
        network = torchvision.models.get_model(name, weights=None, weights_backbone=None, **options)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(torch.stack([reference_input(picture) for picture in made_pictures()]))
    return network.eval()


def reference_input(picture: images.Rgb) -> torch.Tensor:
    """The network's input made by torchvision's transforms."""
    steps = [
        transforms.Resize((SIZE, SIZE)),
        transforms.ToTensor(),
        transforms.Normalize(images.IMAGENET_MEAN, images.IMAGENET_STD),
    ]
    tensor: torch.Tensor = transforms.Compose(steps)(Image.fromarray(picture))
    return tensor


def answers(servable: Any, pictures: list[images.Rgb]) -> list[np.ndarray]:
    """All stages after decoding, as the engine calls them."""
    batch = servable.to_device(servable.preprocess(pictures))
    replies = servable.postprocess(servable.to_host(servable.forward(batch)), len(pictures))
    return [deeplab.decode_class_map(reply)[0] for reply in replies]


def saved(state: Any, path: Path) -> str:
    torch.save(state, path)
    return str(path)


# --- Maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", deeplab.ARCHITECTURES)
def test_maps_equal_torchvisions(name: str, tmp_path: Path) -> None:
    """On the same weights and pictures, a map is the argmax of torchvision's own model, cell for cell."""
    network = lively(name)
    options = ModelOptions(weights=saved(network.state_dict(), tmp_path / "w.pt"), image_size=SIZE)
    servable = deeplab.serve(name, options)
    with torch.inference_mode():
        inputs = torch.stack([reference_input(picture) for picture in made_pictures()])
        expected = network(inputs)["out"].argmax(1).numpy()
    np.testing.assert_array_equal(np.stack(answers(servable, made_pictures())), expected)
    assert len(np.unique(expected)) > 2
    assert servable.info.params == PARAMS[name]


def test_the_auxiliary_head_does_not_change_the_map(tmp_path: Path) -> None:
    """A checkpoint with aux_classifier.* loads strictly and is served without that head, to the same maps."""
    network = lively(SMALL, aux_loss=True)
    weights = saved(network.state_dict(), tmp_path / "w.pt")
    servable = deeplab.serve(SMALL, ModelOptions(weights=weights, image_size=SIZE))
    assert servable.module.aux_classifier is None
    assert servable.info.params == PARAMS[SMALL]
    with torch.inference_mode():
        expected = network(reference_input(made_pictures()[0])[None])["out"].argmax(1).numpy()
    np.testing.assert_array_equal(answers(servable, made_pictures()[:1])[0], expected[0])


def test_a_request_is_answered_at_the_input_size() -> None:
    """The example request travels through all stages; its map has the network's input size and 19 classes."""
    servable = deeplab.serve(SMALL, ModelOptions(num_classes=19, image_size=40))
    batch = servable.to_device(servable.preprocess([servable.decode(servable.example())]))
    (reply,) = servable.postprocess(servable.to_host(servable.forward(batch)), 1)
    class_map, classes = deeplab.decode_class_map(reply)
    assert (class_map.shape, classes) == ((40, 40), 19)
    assert (servable.info.weights, servable.info.task) == ("random", "segmentation")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_answers(precision: str) -> None:
    """16-bit networks answer with maps of the same form."""
    servable = deeplab.serve(SMALL, ModelOptions(image_size=SIZE, precision=precision, channels_last=True))
    assert answers(servable, made_pictures()[:1])[0].shape == (SIZE, SIZE)


@given(class_map=arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40))), classes=st.integers(1, 255))
@settings(max_examples=60)
def test_maps_come_back(class_map: np.ndarray, classes: int) -> None:
    """A reply decodes to the very map and number of classes it was made of."""
    decoded, number = deeplab.decode_class_map(deeplab.encode_class_map(class_map, classes))
    np.testing.assert_array_equal(decoded, class_map)
    assert number == classes


@given(payload=st.binary(max_size=60))
def test_noise_is_no_map(payload: bytes) -> None:
    """Bytes that are no reply raise ValueError and nothing else."""
    with pytest.raises(ValueError, match="class map"):
        deeplab.decode_class_map(payload)


@pytest.mark.parametrize("cells", [3, 5, 10_000_000])
def test_a_map_of_the_wrong_size_is_refused(cells: int) -> None:
    """A stream that holds more or fewer cells than the header says is refused without unpacking all of it."""
    payload = deeplab.HEADER.pack(2, 2, 21) + zlib.compress(bytes(cells))
    with pytest.raises(ValueError, match="2x2"):
        deeplab.decode_class_map(payload)


# --- Options and weights ----------------------------------------------------------------------------------------


def test_the_table_lists_three_networks() -> None:
    """Three backbones, at the original's 224 pixels unless asked otherwise."""
    assert [row.name for row in deeplab.MODELS] == list(PARAMS)
    assert {(row.image_size, row.task) for row in deeplab.MODELS} == {(224, "segmentation")}


def test_same_seed_same_network() -> None:
    """Random weights come from the seed and leave the process's random state alone."""
    state = torch.random.get_rng_state()
    first, second, other = (deeplab.build(SMALL, 21, False, seed).state_dict() for seed in (4, 4, 5))
    assert torch.equal(torch.random.get_rng_state(), state)
    key = "classifier.4.weight"
    assert torch.equal(first[key], second[key])
    assert not torch.equal(first[key], other[key])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ModelOptions(image_size=0), "image size 0"),
        (ModelOptions(image_size=70_000), "image size 70000"),
        (ModelOptions(num_classes=256), "num_classes 256"),
        (ModelOptions(extra={"auxx": True}), 'did you mean "aux"'),
        (ModelOptions(extra={"aux": 1}), "give true or false"),
        (ModelOptions(weights="default", num_classes=19), "21 classes"),
        (ModelOptions(weights="/nowhere/w.pt"), "does not exist"),
    ],
)
def test_wrong_options_are_explained(options: ModelOptions, message: str) -> None:
    """An option that cannot be met is an InputError, in serving as in training."""
    for offer in (deeplab.serve, deeplab.train):
        with pytest.raises(InputError, match=message):
            offer(SMALL, options)


def test_the_file_says_how_many_classes(tmp_path: Path) -> None:
    """The number of classes comes from the weights; a different num_classes is refused."""
    weights = saved(deeplab.build(SMALL, 19, False, 0).state_dict(), tmp_path / "w.pt")
    assert deeplab.serve(SMALL, ModelOptions(weights=weights)).num_classes == 19
    with pytest.raises(InputError, match="for 19 classes"):
        deeplab.serve(SMALL, ModelOptions(weights=weights, num_classes=21))
    with pytest.raises(InputError, match="no auxiliary head"):
        deeplab.train(SMALL, ModelOptions(weights=weights, extra={"aux": True}))


def test_released_weights_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the released weights are neither cached nor reachable, the error says what to do instead."""

    def unreachable(*_arguments: Any, **_options: Any) -> None:
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    with pytest.raises(InputError, match="cannot be fetched") as refusal:
        deeplab.serve(SMALL, ModelOptions(weights="default"))
    assert "path as weights" in str(refusal.value)


# --- Training ---------------------------------------------------------------------------------------------------


def made_batch(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures whose left half is dark (class 0) and right half bright (class 1), with an ignored border."""
    pictures = torch.zeros(count, 3, SIZE, SIZE)
    pictures[..., SIZE // 2 :] = 1.0
    masks = (pictures[:, 0] > 0.5).long()
    masks[:, :4] = deeplab.IGNORED
    return pictures, masks


@pytest.mark.parametrize(("aux", "precision"), [(False, "fp32"), (True, "fp32"), (False, "bf16")])
def test_training_steps_reduce_the_loss(aux: bool, precision: str) -> None:
    """Some steps of SGD on made masks lower the loss, with and without the auxiliary head."""
    options = ModelOptions(num_classes=2, image_size=SIZE, extra={"aux": aux}, precision=precision)
    trainable = deeplab.train(SMALL, options)
    optimizer = torch.optim.SGD(trainable.module.parameters(), lr=0.02)
    losses = []
    for _ in range(6):
        loss = trainable.loss(made_batch())
        assert loss.shape == ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_is_torchs(tmp_path: Path) -> None:
    """The loss is torch's mean cross-entropy over labelled pixels, plus half of the auxiliary head's."""
    weights = saved(lively(SMALL, num_classes=2, aux_loss=True).state_dict(), tmp_path / "w.pt")
    trainable = deeplab.train(SMALL, ModelOptions(weights=weights, image_size=SIZE))
    trainable.module.eval()
    pictures, masks = made_batch()
    output = trainable.module(pictures)
    terms = [torch.nn.functional.cross_entropy(output[key], masks, ignore_index=255) for key in ("out", "aux")]
    torch.testing.assert_close(trainable.loss((pictures, masks)), terms[0] + 0.5 * terms[1])
    assert trainable.info.notes == "with auxiliary head"


def test_one_picture_is_refused_with_the_reason() -> None:
    """A batch of 1 in training is an InputError that names BatchNorm and the least batch, not torch's message."""
    trainable = deeplab.train(SMALL, ModelOptions(num_classes=2, image_size=SIZE))
    assert trainable.min_batch == 2
    with pytest.raises(InputError, match="BatchNorm") as refusal:
        trainable.loss(made_batch(1))
    assert "at least 2" in str(refusal.value)


def test_a_class_the_network_lacks_is_refused() -> None:
    """A mask with a class past the network's is an InputError, before a device-side assertion; 255 is none."""
    trainable = deeplab.train(SMALL, ModelOptions(num_classes=2, image_size=SIZE))
    pictures, masks = made_batch()
    masks[0, 20, 20] = 2
    with pytest.raises(InputError, match="class 2"):
        trainable.loss((pictures, masks))


def test_nothing_labelled_is_no_loss() -> None:
    """Masks that are all "ignore" give a loss of 0 with a graph, not NaN."""
    trainable = deeplab.train(SMALL, ModelOptions(num_classes=2, image_size=SIZE))
    pictures, masks = made_batch()
    loss = trainable.loss((pictures, torch.full_like(masks, deeplab.IGNORED)))
    loss.backward()
    assert loss.item() == 0


def test_fp16_training_is_refused() -> None:
    """Training in fp16 would need loss scaling and is refused."""
    with pytest.raises(InputError, match="loss scaling"):
        deeplab.train(SMALL, ModelOptions(image_size=SIZE, precision="fp16"))
