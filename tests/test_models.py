"""Finding and loading VAEs: shipped, in folders, and in the hub's cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file

from halovae.base.errors import InputError
from halovae.media import models

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small VAE of images."""
    folder = tmp_path_factory.mktemp("models") / "kl"
    FAMILIES["kl"].build().save_pretrained(folder)
    return folder


@pytest.fixture
def vae(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "kl"))


def write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def load(source: models.VaeSource, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return models.load(source, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("name", [None, "demo"])
def test_the_shipped_vae(name: str | None) -> None:
    source = models.find(name)
    assert (source.model, source.class_name) == ("demo", "AutoencoderKLWan")
    vae = load(source, torch.bfloat16)
    assert not vae.training
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_a_folder_with_a_vae(vae: Path) -> None:
    source = models.find(str(vae))
    assert source == models.VaeSource(
        model=str(vae), location=str(vae), subfolder=None, class_name=FAMILIES["kl"].model
    )
    kept = load_file(vae / WEIGHTS)
    assert all(torch.equal(value, kept[name]) for name, value in load(source).state_dict().items())


def test_a_relative_folder_is_remembered_by_its_whole_name(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(vae.parent)
    assert models.find("./kl").model == str(vae)


@pytest.mark.parametrize("component", ["vae", "movq"])
def test_a_folder_with_a_pipeline(vae: Path, tmp_path: Path, component: str) -> None:
    index = {
        "_class_name": "WanPipeline",
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "image_processor": [None, None],
        component: ["diffusers", FAMILIES["kl"].model],
    }
    write_json(tmp_path / "pipe" / "model_index.json", index)
    shutil.copytree(vae, tmp_path / "pipe" / component)
    source = models.find(str(tmp_path / "pipe"))
    assert source.subfolder == component
    load(source)


def test_a_folder_with_a_vae_folder(vae: Path, tmp_path: Path) -> None:
    shutil.copytree(vae, tmp_path / "pipe" / "vae")
    load(models.find(str(tmp_path / "pipe")))


def empty(folder: Path) -> None:
    folder.mkdir()


def pipeline_without_vae(folder: Path) -> None:
    index = {"_class_name": "Lumina2Pipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    write_json(folder / "model_index.json", index)


def transformer(folder: Path) -> None:
    write_json(folder / "config.json", {"_class_name": "WanTransformer3DModel"})


def language_model(folder: Path) -> None:
    write_json(folder / "config.json", {"architectures": ["T5EncoderModel"]})


def hostile_class(folder: Path) -> None:
    write_json(folder / "config.json", {"_class_name": "utils.os.system"})


def broken_config(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{")


def config_of_another_kind(folder: Path) -> None:
    write_json(folder / "config.json", ["AutoencoderKL"])


def a_file(folder: Path) -> None:
    folder.write_text("weights")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty, "has no VAE"),
        (pipeline_without_vae, "is a Lumina2Pipeline without a VAE"),
        (transformer, "WanTransformer3DModel, which is no autoencoder"),
        (language_model, "None, which is no autoencoder"),
        (hostile_class, "which is no autoencoder"),
        (broken_config, "can't read .*config.json"),
        (config_of_another_kind, "is not a JSON object"),
        (a_file, "is a file"),
    ],
)
def test_models_without_a_vae_are_one_line(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "model")
    with pytest.raises(InputError, match=message) as caught:
        models.find(str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none", "a/b/c", "/none/where", "a b/c", "../../none"])
def test_names_of_nothing_are_one_line(name: str) -> None:
    with pytest.raises(InputError, match="--model"):
        models.find(name)


def no_weights(vae: Path) -> None:
    (vae / WEIGHTS).unlink()


def truncated_weights(vae: Path) -> None:
    (vae / WEIGHTS).write_bytes((vae / WEIGHTS).read_bytes()[:5000])


def fewer_weights(vae: Path) -> None:
    kept = load_file(vae / WEIGHTS)
    kept.pop("encoder.conv_in.weight")
    save_file(kept, vae / WEIGHTS, metadata={"format": "pt"})


def other_shapes(vae: Path) -> None:
    config = json.loads((vae / "config.json").read_text())
    write_json(vae / "config.json", {**config, "latent_channels": 7})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_weights, "can't load"),
        (truncated_weights, "can't load"),
        (fewer_weights, "lack 1 tensors of AutoencoderKL, e.g. encoder.conv_in.weight"),
        (other_shapes, "can't load"),
    ],
)
def test_broken_weights_are_one_line(vae: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(vae)
    with pytest.raises(InputError, match=message) as caught:
        load(models.find(str(vae)))
    assert "\n" not in str(caught.value)


class TestHub:
    """Through the hub's cache, as an earlier download leaves it; nothing here needs the network."""

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        return tmp_path / "hub"

    def repository(self, cache: Path, name: str) -> Path:
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        return folder / "snapshots" / ("0" * 40)

    def test_what_is_not_there_is_one_line(self, cache: Path) -> None:
        with pytest.raises(InputError, match="--model some/where: not in the local cache") as caught:
            models.find("some/where")
        assert "\n" not in str(caught.value)

    def test_a_pipeline(self, cache: Path, saved: Path) -> None:
        snapshot = self.repository(cache, "some/pipeline")
        write_json(snapshot / "model_index.json", {"vae": ["diffusers", FAMILIES["kl"].model]})
        shutil.copytree(saved, snapshot / "vae")
        source = models.find("some/pipeline")
        assert (source.model, source.subfolder) == ("some/pipeline", "vae")
        load(source)
