"""The torchvision classifiers: same numbers as torchvision, the known traps handled, training reduces loss."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from corun import images, registry, torch_tools
from corun.errors import InputError
from corun.registry import ModelOptions

cnn = registry.load_plugin("models", "cnn")
MODELS = {model.name: model for model in cnn.MODELS}
STUDY = [
    "alexnet",
    "convnext_base",
    "densenet121",
    "densenet201",
    "efficientnet_v2_l",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnet152",
    "shufflenet_v2_x1_0",
    "squeezenet1_0",
    "squeezenet1_1",
    "vgg11",
    "vgg16",
    "vgg19",
    "vit_b_16",
    "vit_l_32",
]
SMALL = {
    "mobilenet_v3_small": 2_542_856,
    "squeezenet1_1": 1_235_496,
    "shufflenet_v2_x1_0": 2_278_604,
    "resnet18": 11_689_512,
    "googlenet": 6_624_904,
    "inception_v3": 23_834_568,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def network(name: str) -> object:
    return next(row for row in cnn.NETWORKS if row.name == name)


def photo(seed: int = 0, height: int = 260, width: int = 300) -> bytes:
    return images.encode_jpeg(images.made_image(seed, height, width))


def logits(model: object, payloads: list[bytes]) -> torch.Tensor:
    batch = model.preprocess([model.decode(payload) for payload in payloads])
    return model.to_host(model.forward(model.to_device(batch)))


def save(tmp_path: Path, state: object, name: str = "weights.pth") -> str:
    torch.save(state, tmp_path / name)
    return str(tmp_path / name)


def plain(name: str, **arguments: object) -> torch.nn.Module:
    torch.manual_seed(3)
    return torchvision.models.get_model(name, weights=None, **arguments).eval()


def test_every_classifier_of_the_study_is_listed() -> None:
    """The 21 networks of the study and vit_l_32 are there, with their image size, servable and trainable."""
    assert sorted(MODELS) == sorted(STUDY)
    for model in MODELS.values():
        assert model.image_size == (299 if model.name == "inception_v3" else 224)
        assert (model.task, model.family) == ("classification", "cnn")
        assert model.train is not None


def test_listing_leaves_torch_out() -> None:
    """Reading the model table imports neither torch nor torchvision."""
    code = (
        "import sys; sys.path.insert(0, 'src')\n"
        "from corun import registry\n"
        "assert registry.load_plugin('models', 'cnn').MODELS\n"
        "sys.exit(bool({'torch', 'torchvision'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_serve(name: str) -> None:
    """Each small network has the published parameter count, answers a batch, and packs five pairs in 40 bytes."""
    model = MODELS[name].serve(ModelOptions(image_size=96))
    assert model.info.params == SMALL[name]
    assert (model.info.image_size, model.info.weights) == (96, "random")
    replies = model.postprocess(logits(model, [model.example(), photo(1)]), 1)
    assert len(replies) == 1
    assert len(replies[0]) == 40
    pairs = cnn.read_reply(replies[0])
    probabilities = [probability for _, probability in pairs]
    assert probabilities == sorted(probabilities, reverse=True)
    assert struct.unpack("<" + "if" * 5, replies[0])[0::2] == tuple(label for label, _ in pairs)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_logits_equal_torchvision(name: str, tmp_path: Path) -> None:
    """From the same weights and photo, logits equal torchvision's model on torchvision's own transform."""
    reference = plain(name)
    model = MODELS[name].serve(ModelOptions(weights=save(tmp_path, reference.state_dict())))
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    picture = Image.open(io.BytesIO(photo())).convert("RGB")
    with torch.inference_mode():
        expected = reference(transform(picture)[None])
    assert torch.equal(logits(model, [photo()]), expected)
    assert model.info.weights.startswith("sha256:")


def test_random_weights_depend_on_the_seed_alone() -> None:
    """Equal seeds give equal networks, other seeds others, and the process's generator is left alone."""
    before = torch.get_rng_state()
    first, again, other = (MODELS["squeezenet1_1"].serve(ModelOptions(seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(first, [photo()]), logits(again, [photo()]))
    assert not torch.equal(logits(first, [photo()]), logits(other, [photo()]))


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_v2_l", "inception_v3", "convnext_base"])
def test_preprocessing_equals_torchvisions_preset(name: str) -> None:
    """At the released weights' crop size the input equals `weights.transforms()` bit for bit."""
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    how = cnn.preset(network(name))
    fake = SimpleNamespace(info=SimpleNamespace(image_size=transform.crop_size[0]), how=how)
    picture = images.made_image(2, 333, 500)
    mine = cnn.Classifier._prepared(fake, picture)
    assert np.array_equal(mine, transform(Image.fromarray(picture)).numpy())


@given(st.integers(1, 900), st.integers(1, 900))
@settings(max_examples=15, deadline=None)
def test_any_picture_becomes_one_square(height: int, width: int) -> None:
    """A picture of any shape becomes a finite float32 (3, size, size) input."""
    how = cnn.Preset(256 / 224, images.BILINEAR, images.IMAGENET_MEAN, images.IMAGENET_STD)
    fake = SimpleNamespace(info=SimpleNamespace(image_size=64), how=how)
    prepared = cnn.Classifier._prepared(fake, np.zeros((height, width, 3), np.uint8))
    assert prepared.shape == (3, 64, 64)
    assert prepared.dtype == np.float32


@given(st.lists(st.floats(-80, 80, width=32), min_size=2, max_size=12), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_top_five_is_the_softmax_sorted(values: list[float], count: int) -> None:
    """A reply holds the softmax's largest values in order; networks of under five classes send fewer pairs."""
    rows = torch.tensor([values] * 3)
    replies = cnn.Classifier.postprocess(None, rows, count)
    assert len(replies) == count
    expected = torch.softmax(rows[0].double(), 0).sort(descending=True).values[:5]
    pairs = cnn.read_reply(replies[0])
    assert np.allclose([probability for _, probability in pairs], expected, atol=1e-6)
    assert len({label for label, _ in pairs}) == min(5, len(values))


@pytest.mark.parametrize("payload", [b"", b"not an image", photo()[:400], b"\xff\xd8\xff" + bytes(90)])
def test_a_corrupt_payload_is_a_value_error(payload: bytes) -> None:
    """Damaged bytes raise ValueError with a sentence, so the server can answer BAD_REQUEST."""
    model = cnn.Classifier.__new__(cnn.Classifier)
    with pytest.raises(ValueError, match="not a readable image"):
        model.decode(payload)


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("inception_v3", 74, "at least 75"),
        ("alexnet", 62, "at least 63"),
        ("squeezenet1_0", 20, "at least 21"),
        ("densenet121", 28, "at least 29"),
        ("vgg11", 31, "at least 32"),
        ("resnet18", 0, "at least 1"),
        ("vit_b_16", 230, "multiple of its patch, 16"),
    ],
)
def test_a_too_small_image_names_the_minimum(name: str, size: int, says: str) -> None:
    """A size the network cannot take is refused before it is built, for serving and for training."""
    for build in (MODELS[name].serve, MODELS[name].train):
        with pytest.raises(InputError, match=says):
            build(ModelOptions(image_size=size))


@pytest.mark.parametrize("name", ["squeezenet1_0", "densenet121", "alexnet"])
def test_the_minimum_is_the_networks_own(name: str) -> None:
    """A network runs at the stated minimum and fails one pixel below."""
    with torch.device("meta"):
        module = torchvision.models.get_model(name, weights=None).eval()
    minimum = network(name).minimum
    assert module(torch.empty(1, 3, minimum, minimum, device="meta")).shape == (1, 1000)
    with pytest.raises(RuntimeError):
        module(torch.empty(1, 3, minimum - 1, minimum - 1, device="meta"))


def test_unknown_options_are_refused() -> None:
    """A classifier has no options of its own, so a stray one is an error, not silence."""
    with pytest.raises(InputError, match='"conf" is unknown'):
        MODELS["resnet18"].serve(ModelOptions(extra={"conf": 0.3}))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_released_checkpoint_gets_input_transform_and_no_aux_heads(name: str, tmp_path: Path) -> None:
    """A file with auxiliary heads is served without them and gives what torchvision gives for such a file."""
    reference = plain(name, init_weights=False, aux_logits=True, transform_input=True)
    model = MODELS[name].serve(ModelOptions(weights=save(tmp_path, reference.state_dict()), image_size=96))
    assert model.module.transform_input
    assert model.info.params == SMALL[name]
    batch = model.preprocess([model.decode(photo())])
    with torch.inference_mode():
        expected = reference(batch)
    assert torch.equal(model.forward(batch), expected)


def test_old_densenet_names_are_read() -> None:
    """Released DenseNet files (`norm.1.weight`) load although today's names differ (`norm1.weight`)."""
    with torch.device("meta"):
        names = torchvision.models.densenet121(weights=None).state_dict()
    layers = {name for name in names if "denselayer" in name}
    state = {re.sub(r"(norm|conv)([12])", r"\1.\2", name): 0 for name in layers}
    cnn._adapt(network("densenet121"), state, 224, aux=False)
    assert set(state) == layers


def test_versioned_checkpoints_keep_their_version(tmp_path: Path) -> None:
    """mnasnet refuses a state without its version mark: the mark of a torch file survives reading."""
    state = plain("mnasnet0_5").state_dict()
    model = MODELS["mnasnet0_5"].serve(ModelOptions(weights=save(tmp_path, state), image_size=64))
    assert torch.equal(model.module.layers[0].weight, state["layers.0.weight"])


def test_a_vit_checkpoint_is_interpolated_to_another_size() -> None:
    """The position embedding of a 224 px checkpoint is brought to the grid of the size in use."""
    state = {"encoder.pos_embedding": torch.randn(1, 197, 8)}
    cnn._adapt(network("vit_b_16"), state, 448, aux=False)
    assert state["encoder.pos_embedding"].shape == (1, 28 * 28 + 1, 8)


def test_weights_that_do_not_fit_list_the_differences(tmp_path: Path) -> None:
    """Loading is strict: another network's file is refused with names from it."""
    path = save(tmp_path, plain("squeezenet1_1").state_dict())
    with pytest.raises(InputError, match="do not fit") as caught:
        MODELS["squeezenet1_0"].serve(ModelOptions(weights=path))
    assert "features.0.weight" in str(caught.value)


def test_a_pickle_of_code_is_refused(tmp_path: Path) -> None:
    """A file that holds a whole module is refused unread: only tensors are loaded."""
    path = save(tmp_path, plain("squeezenet1_1"))
    with pytest.raises(InputError, match="more than weights"):
        MODELS["squeezenet1_1"].serve(ModelOptions(weights=path))


def test_missing_weights_say_what_to_give(tmp_path: Path) -> None:
    """A path that does not exist, and released weights that cannot be fetched, each say what to do."""
    with pytest.raises(InputError, match="does not exist"):
        MODELS["resnet18"].serve(ModelOptions(weights=str(tmp_path / "none.pth")))


def test_released_weights_that_cannot_be_fetched_name_file_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network, `default` says which file to put where."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(InputError) as caught:
        MODELS["resnet18"].serve(ModelOptions(weights="default"))
    assert "resnet18-f37072fd.pth" in str(caught.value)
    assert str(tmp_path / "checkpoints") in str(caught.value)


def test_released_weights_in_the_cache_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`default` reads torch.hub's cache and is labelled so."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    reference = plain("squeezenet1_1")
    save(tmp_path / "checkpoints", reference.state_dict(), "squeezenet1_1-b8a52dc0.pth")
    model = MODELS["squeezenet1_1"].serve(ModelOptions(weights="default"))
    assert (model.info.weights, model.info.notes) == ("default", "torchvision IMAGENET1K_V1")
    assert torch.equal(model.module.state_dict()["features.0.weight"], reference.features[0].weight)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_and_layout_change_numbers_little(precision: str) -> None:
    """bf16 and fp16 with channels_last answer near fp32, as float32 on the host."""
    exact = logits(MODELS["squeezenet1_1"].serve(ModelOptions(image_size=64)), [photo()])
    options = ModelOptions(image_size=64, precision=precision, channels_last=True)
    rough = logits(MODELS["squeezenet1_1"].serve(options), [photo()])
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, atol=0.05 * float(exact.abs().max()) + 0.02)


def test_bad_devices_and_precisions_are_named() -> None:
    """An unknown device or precision is an input error, and so is training in fp16."""
    with pytest.raises(InputError, match="device"):
        torch_tools.torch_device("gpu0")
    with pytest.raises(InputError, match="not there"):
        torch_tools.torch_device("cuda:99")
    with pytest.raises(InputError, match='did you mean "bf16"'):
        torch_tools.torch_dtype("bf61")
    with pytest.raises(InputError, match="loss scaling"):
        MODELS["squeezenet1_1"].train(ModelOptions(precision="fp16"))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "googlenet"])
def test_training_reduces_the_loss(name: str) -> None:
    """A few SGD steps on one batch reduce its loss; googlenet's named tuple of heads included."""
    training = MODELS[name].train(ModelOptions(image_size=64, num_classes=4))
    assert training.module.training
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(4, 3, 64, 64, generator=generator), torch.arange(4)
    optimiser = torch.optim.SGD(training.module.parameters(), lr=0.02, momentum=0.9)
    torch.manual_seed(0)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = training.loss(batch)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert min(losses[-2:]) < losses[0]


def test_auxiliary_heads_weigh_as_published() -> None:
    """googlenet's loss is main + 0.3 of each auxiliary head's."""
    training = MODELS["googlenet"].train(ModelOptions(image_size=64, num_classes=4))
    training.module.eval()
    heads = list(torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)))
    training.module = lambda _: tuple(heads)
    labels = torch.tensor([1, 2])
    main, *aux = [torch.nn.functional.cross_entropy(head, labels) for head in heads]
    assert torch.isclose(training.loss((torch.zeros(1), labels)), main + 0.3 * sum(aux))


def test_inception_trains_below_299_without_its_auxiliary_head() -> None:
    """At 299 the head is there and a batch of one is impossible; below, neither."""
    small = MODELS["inception_v3"].train(ModelOptions(image_size=128, num_classes=4))
    full = MODELS["inception_v3"].train(ModelOptions(num_classes=4))
    assert (small.module.aux_logits, small.min_batch) == (False, 1)
    assert (full.module.aux_logits, full.min_batch) == (True, 2)
    assert torch.isfinite(small.loss((torch.randn(1, 3, 128, 128), torch.zeros(1, dtype=torch.int64))))


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("shufflenet_v2_x1_0", 32), ("googlenet", 46)])
def test_minimum_batch_is_two_exactly_where_batch_norm_needs_it(name: str, size: int) -> None:
    """Below `single_from` a batch of one fails in BatchNorm and min_batch says 2; one pixel more, it works."""
    one = torch.zeros(1, dtype=torch.int64)
    below = MODELS[name].train(ModelOptions(image_size=size, num_classes=4))
    assert below.min_batch == 2
    with pytest.raises(ValueError, match="more than 1 value"):
        below.loss((torch.randn(1, 3, size, size), one))
    above = MODELS[name].train(ModelOptions(image_size=size + 1, num_classes=4))
    assert above.min_batch == 1
    assert torch.isfinite(above.loss((torch.randn(1, 3, size + 1, size + 1), one)))


def test_fine_tuning_starts_from_a_checkpoint_with_other_classes(tmp_path: Path) -> None:
    """With num_classes given, training keeps the file's features and gets a fresh last layer; serving refuses."""
    reference = plain("resnet18")
    path = save(tmp_path, reference.state_dict())
    training = MODELS["resnet18"].train(ModelOptions(weights=path, num_classes=7))
    assert torch.equal(training.module.conv1.weight, reference.conv1.weight)
    assert training.module.fc.weight.shape == (7, 512)
    assert "fc.weight" in training.info.notes
    with pytest.raises(InputError, match=r"fc\.weight"):
        MODELS["resnet18"].serve(ModelOptions(weights=path, num_classes=7))


def test_bf16_training_keeps_float32_weights() -> None:
    """bf16 training is mixed precision: parameters and the loss stay float32."""
    options = ModelOptions(image_size=64, num_classes=4, precision="bf16", channels_last=True)
    training = MODELS["squeezenet1_1"].train(options)
    loss = training.loss((torch.randn(2, 3, 64, 64), torch.tensor([0, 1])))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in training.module.parameters())
