"""Find and load a VAE: the one that ships with halovae, a folder, or a model of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn

from halovae.base.errors import InputError
from halovae.base.files import DEMO, check_model, first_line, no_vae, read_json
from halovae.base.quiet import quiet

_SHIPPED = str(Path(__file__).with_name("demo_vae"))


@dataclass(frozen=True, kw_only=True)
class VaeSource:
    """Where a VAE is, found without loading any weights."""

    model: str
    """As in metadata: "demo", an absolute folder, or a hub id."""
    location: str
    """What `from_pretrained` gets."""
    subfolder: str | None
    class_name: str


def find(model: str | None) -> VaeSource:
    """Find the VAE of `model`.

    Args:
        model: None or "demo" for the shipped one; the folder of a VAE or of a pipeline; a hub id such as
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers".

    Raises:
        InputError: there is no such model, or no VAE in it.
    """
    name = _SHIPPED if model is None or model == DEMO else model
    folder = Path(name).expanduser()
    location = str(folder.resolve()) if folder.is_dir() else name
    shown = DEMO if name is _SHIPPED else location
    index = read_config(location, "model_index.json")
    if index is not None:
        component, class_name = _component(name, index)
        return VaeSource(model=shown, location=location, subfolder=component, class_name=class_name)
    for subfolder in (None, "vae"):
        config = read_config(location, _config(subfolder))
        if config is not None:
            class_name = _checked(config, f"--model {name} holds")
            return VaeSource(model=shown, location=location, subfolder=subfolder, class_name=class_name)
    if name is _SHIPPED:
        raise InputError("this installation lacks the demonstration VAE: reinstall halovae, or name a --model")
    raise no_vae(name)


def read_config(model: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a model (a folder or a hub id), None where the model has none of that name.

    Raises:
        InputError: there is no such model, it can't be reached, or the file holds something else.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return read_json(folder / name) if (folder / name).is_file() else None
    check_model(model)
    try:
        with quiet():
            path = Path(hf_hub_download(model, name))
    except LocalEntryNotFoundError as error:
        raise InputError(f"--model {model}: not in the local cache, and the hub can't be reached") from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # The hub, its HTTP library and the system below it.
        raise InputError(f"--model {model}: {first_line(error)}") from error
    return read_json(path)


def load(source: VaeSource, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load the VAE for inference.

    Raises:
        InputError: weights are missing, damaged or of other shapes than the config says.
    """
    cls = _autoencoder(source.class_name)
    assert cls is not None, "find() has checked it"
    options: dict[str, Any] = {} if source.subfolder is None else {"subfolder": source.subfolder}
    try:
        with quiet():
            vae, found = cls.from_pretrained(source.location, torch_dtype=dtype, output_loading_info=True, **options)
    except Exception as error:  # diffusers, the hub and safetensors each have their own families.
        raise InputError(f"can't load the {source.class_name} of {source.model}: {first_line(error)}") from error
    # diffusers only warns, and leaves such weights random.
    missing = found["missing_keys"]
    if missing:
        raise InputError(
            f"the weights of {source.model} lack {len(missing)} tensors of {source.class_name}, e.g. {missing[0]}"
        )
    return vae.to(device=device).eval().requires_grad_(False)


def skeleton(cls: Any, config: Mapping[str, Any]) -> Any:
    """A VAE without weights: its parameters are on the meta device, where there are shapes and no values."""
    with quiet():
        try:
            with torch.device("meta"):
                vae = cls.from_config(config)
        except RuntimeError:  # A constructor that computes with values, which meta tensors have not.
            vae = cls.from_config(config)
    # Some modules make tensors in a way that overlooks the device context.
    return vae.to("meta").eval()


def find_skeleton(model: str | None) -> tuple[str, Any]:
    """What to call the VAE of `model`, and the VAE without weights. Reads configs, and no weights.

    Args:
        model: as for `find`, or the config.json of a VAE.
    """
    path = Path(model or "").expanduser()
    if model is not None and path.is_file():
        config = read_json(path)
        class_name, name = _checked(config, f"{path} is of"), str(path)
    else:
        source = find(model)
        class_name, name = source.class_name, source.model
        config = read_config(source.location, _config(source.subfolder))
        if config is None:
            raise InputError(f"{name} has no {_config(source.subfolder)}")
    try:
        return name, skeleton(_autoencoder(class_name), config)
    except Exception as error:  # Whatever a class says of values that it can't take.
        raise InputError(f"can't build the {class_name} of {name} from its config: {first_line(error)}") from error


def _config(subfolder: str | None) -> str:
    return "config.json" if subfolder is None else f"{subfolder}/config.json"


def _checked(config: Mapping[str, Any], what: str) -> str:
    """The class that a config names."""
    class_name = str(config.get("_class_name"))
    if _autoencoder(class_name) is None:
        raise InputError(f"{what} a {class_name}, which is no autoencoder of diffusers")
    return class_name


def _component(model: str, index: Mapping[str, Any]) -> tuple[str, str]:
    """Name and class of the autoencoder among a pipeline's components."""
    found = {
        name: str(entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and _autoencoder(str(entry[1])) is not None
    }
    if not found:
        raise InputError(f"{model} is a {index.get('_class_name')} without a VAE")
    name = "vae" if "vae" in found else next(iter(found))
    return name, found[name]


def _autoencoder(class_name: str) -> Any:
    """The class of diffusers of that name if it can encode and decode, else None."""
    import diffusers  # Takes long, and readers of a dataset know no VAE.

    cls: Any = getattr(diffusers, class_name, None) if re.fullmatch(r"\w+", class_name) else None
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        return None
    usable = all(hasattr(cls, name) for name in ("encode", "decode", "from_pretrained"))
    return cast(Any, cls) if usable else None
