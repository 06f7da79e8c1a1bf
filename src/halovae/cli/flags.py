"""The flags of all commands, each written once: what it means, and which commands take it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from enum import Enum
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from halovae.app import launch
from halovae.app.run_options import check_written, parse_axis, parse_counts, parse_grid, parse_pair
from halovae.base.errors import Faults, InputError
from halovae.base.files import DEMO, check_input, check_model, check_new_folder, check_output, check_vae
from halovae.pipelines.generation_settings import Setup
from halovae.serve.server_settings import parse_keep, read_key

if TYPE_CHECKING:
    from halovae.media import FrameRange


_ARGUMENTS = "Arguments"


class Dtype(str, Enum):
    """Names of the number formats, as torch has them."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"

    __str__ = str.__str__


@dataclass(frozen=True)
class _Flag:
    commands: Set[str]
    name: str
    """Of the command's parameter."""
    kind: Any
    metavar: str | None
    words: str
    default: Any = None
    """`...` where it has to be given."""
    shown: str | None = None
    """What stands for a default of None."""
    spelled: str = ""
    """The flag, where it is not `--name`."""
    least: float | None = None
    most: float | None = None
    check: Callable[[Any], object] | None = None
    """Refuses a value that is wrong whatever the other flags say."""
    read: Callable[[Any], Any] | None = None
    """Makes of the words what the command gets, or refuses them."""
    is_slow: bool = False
    """Whether the check is left to the command's ranks, if nothing else is wrong."""

    @property
    def flag(self) -> str:
        return self.spelled.split()[0] if self.spelled else "--" + self.name.replace("_", "-")

    @property
    def gives(self) -> str:
        """What may be given, in words; nothing where the check tells it."""
        allowed = self._allowed
        if allowed:
            return f"{', '.join(allowed[:-1])} or {allowed[-1]}"
        if self.kind not in (int, float):
            return ""
        number = "a whole number" if self.kind is int else "a number"
        if self.least is not None:
            number += f" from {self.least:g}" if self.least < 0 or self.least in (0, 1) else " above 0"
        return number if self.most is None else f"{number} to {self.most:g}"

    @property
    def _allowed(self) -> tuple[str, ...]:
        if self.kind is not str and isinstance(self.kind, type) and issubclass(self.kind, Enum):
            return tuple(one.value for one in self.kind)
        return tuple((self.metavar or "").split("|")) if "|" in (self.metavar or "") else ()

    def value(self, given: Any) -> Any:
        """What the command gets for what the user has given.

        Raises:
            InputError: says which flag, which value, and what may be given.
        """
        given = given.value if isinstance(given, Enum) else given
        if self.kind is Path:  # Some versions of typer make it one when the command is called, after this.
            given = Path(given)
        if self._allowed and given not in self._allowed:
            raise InputError(f"{self.flag} {given}: give {self.gives}")
        if self.check is not None:
            self.check(given)
        return given if self.read is None else self.read(given)

    def parameter(self, panel: str, default: Any) -> Parameter:
        """As typer wants it."""
        option: Any = typer.Argument if panel == _ARGUMENTS else typer.Option
        spelled = self.spelled.split() or [self.flag]
        described = option(
            default, *(() if panel == _ARGUMENTS else spelled), metavar=self.metavar, help=self.words,
            show_default=self.shown or True, min=self.least, max=self.most, rich_help_panel=panel,
        )  # fmt: skip
        # What is read here is no path any more when typer looks at it again.
        kind = str if self.kind is Path and self.read else self.kind
        kind = kind | None if default is None else kind
        return Parameter(self.name, Parameter.KEYWORD_ONLY, default=described, annotation=kind)


def takes(command: str, **defaults: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a function the flags of a command: the command line passes all of them, as keyword arguments.

    `defaults` of this command are by the parameter's name.
    """

    def give(function: Callable[..., int]) -> Callable[..., int]:
        context = [Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
        own = [(panel, flag) for panel, flags in _TABLE.items() for flag in flags if command in flag.commands]
        chosen = [flag.parameter(panel, defaults.get(flag.name, flag.default)) for panel, flag in own]
        function.flags = [flag for _, flag in own]  # type: ignore[attr-defined]  # For `Command`.
        function.__signature__ = Signature(context + chosen)  # type: ignore[attr-defined]
        function.__annotations__ = {one.name: one.annotation for one in context + chosen}
        return function

    return give


def _check_vae(model: str) -> None:
    named = _named_vae(model)
    if named != DEMO:
        check_vae(named)


def _check_config(model: str) -> None:
    if not Path(model).expanduser().is_file():
        _check_vae(model)


def _named_vae(model: str) -> str:
    """A folder that is there is meant, also where it has the name of the shipped VAE."""
    return f"./{DEMO}" if model == DEMO and Path(DEMO).is_dir() else model


def _check_clip(output: Path) -> None:
    from halovae.media import SUFFIXES

    check_output(output, SUFFIXES)


def _frames(text: str) -> FrameRange:
    from halovae.media import FrameRange

    return FrameRange.parse(text)


def _check_ranks(ranks: int) -> None:
    launch.check_ranks(min(ranks, 1))  # Whether this machine bears so many is asked where they are started.


def _check_device(kind: str) -> None:
    from halovae.app.session import device_kind

    device_kind(kind)


def _check_buckets(flag: str) -> Callable[[list[str]], None]:
    def check(texts: list[str]) -> None:
        from halovae.datasets.buckets import parse_bucket

        for text in texts:
            parse_bucket(flag, text)

    return check


_I2V, _T2V, _I2I, _SERVE = ({name} for name in ("image-to-video", "text-to-video", "image-to-image", "serve"))
_ENCODE, _DECODE, _ROUNDTRIP, _WARM_UP = ({name} for name in ("encode", "decode", "roundtrip", "warm-up"))
_DATASET = {"encode-dataset"}
_PLAN, _DOCTOR, _COMPARE, _DEMO = ({name} for name in ("plan", "doctor", "compare", "make-demo-model"))
_VIDEO = _I2V | _T2V
_MADE = _VIDEO | _I2I
_WHOLE = _MADE | _SERVE
_READ = _ENCODE | _ROUNDTRIP
_ALONE = _READ | _DECODE
_RUN = _WHOLE | _ALONE | _WARM_UP
_OUTPUT = "-o --output"
_AN_MP4 = "Write the result to this file: an .mp4, or a .png for one frame."
_ITS_OWN = "the pipeline's own"
_AS_IMAGE = "the image's proportions, at about the pipeline's own number of pixels"
_SHIPPED = "the small VAE that ships with halovae"
_MODES = "exact|tile|auto"
_MODE = (
    "exact cuts the picture into shards that exchange borders: the un-tiled result. tile spreads the VAE's own tiles "
    "over the ranks. auto is exact, and tiles where that is refused or memory is short."
)
_OWN_MODE = "exact; tile for a VAE that comes tiled"
_UNTILED = "Give the un-tiled result (exact mode) of a VAE that comes tiled, too."
_TILING = "The same as {}, by the name that vLLM-Omni has for it."
_SIZE = "Use this many of the ranks for the VAE; the others wait, and share its result."

# fmt: off
_TABLE: dict[str, tuple[_Flag, ...]] = {
    _ARGUMENTS: (
        _Flag(_READ, "source", Path, "INPUT", "A video or an image.", ..., check=check_input),
        _Flag(_DECODE, "source", Path, "LATENTS", "A file that halovae encode has made.", ..., check=check_input),
        _Flag(_COMPARE, "one", Path, "A", "The reference: a video, an image, or latents.", ..., check=check_input),
        _Flag(_COMPARE, "other", Path, "B", "The result, of the same kind.", ..., check=check_input),
        _Flag(_DATASET, "source", str, "INPUT", "A folder, a pattern such as 'clips/*.mp4', a manifest (.jsonl, .csv "
              "or .parquet), or .tar files of a WebDataset.", ...),
        _Flag(_DEMO, "folder", Path, "DIR", "Write here: a folder that is not there yet.", ..., check=check_new_folder),
    ),
    "Model and files": (
        *(_Flag(commands, "model", str, "DIR_OR_ID", "Use this pipeline: a folder in diffusers' format, or a hub id "
                f"such as {example}.", ..., check=check_model)
          for commands, example in ((_I2V | _SERVE, "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
                                    (_T2V, "Wan-AI/Wan2.2-T2V-A14B-Diffusers"), (_I2I, "Qwen/Qwen-Image"))),
        _Flag(_I2V | _I2I, "image", Path, "FILE", "Begin with this image.", ..., check=check_input),
        _Flag(_I2V, "last_image", Path, "FILE", "End with this image.", check=check_input),
        _Flag(_VIDEO | _DECODE | _ROUNDTRIP, "output", Path, "FILE", _AN_MP4, ..., spelled=_OUTPUT, check=_check_clip),
        _Flag(_I2I, "output", Path, "FILE", "Write the result to this file, a .png.", ..., spelled=_OUTPUT,
              check=lambda path: check_output(path, (".png",))),
        _Flag(_ENCODE, "output", Path, "FILE", "Write the latents to this file, a .safetensors.", ...,
              spelled=_OUTPUT, check=lambda path: check_output(path, (".safetensors",))),
        _Flag(_DATASET, "output", Path, "DIR", "Write to this folder; a run that was interrupted goes on in it.", ...,
              spelled=_OUTPUT),
        _Flag(_READ | _WARM_UP | _DATASET, "model", str, "DIR_OR_ID", "Use this VAE: the folder of a diffusers VAE "
              "or pipeline, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers. 'demo' is the shipped one, unless a "
              "folder ./demo is there.", shown=_SHIPPED, check=_check_vae, read=_named_vae),
        _Flag(_DECODE, "model", str, "DIR_OR_ID", "As for encode.", shown="the one that the latents were made with",
              check=_check_vae, read=_named_vae),
        _Flag(_PLAN, "model", str, "DIR_OR_ID_OR_CONFIG", "Plan for this VAE: as for roundtrip, or the config.json of "
              "a VAE. Only configs are read.", shown=_SHIPPED, check=_check_config, read=_named_vae),
        _Flag(_DEMO, "kind", str, "image-to-video|text-to-video|image-to-image",
              "Make a pipeline for the command of this name.", "image-to-video"),
        _Flag(_DATASET, "format", str, "safetensors|webdataset|parquet|musubi", "Write safetensors (a file for each "
              "item), webdataset or parquet (shards), or musubi (files as musubi-tuner names them).", "safetensors"),
        _Flag(_DATASET, "shard_size", int, "N", "Put so many items into a shard.", 256, least=1),
        _Flag(_DATASET, "store", str, "mode|parameters", "Keep the latents, or mean and logarithm of the variance.",
              "mode"),
        _Flag(_SERVE, "task", str, "image-to-video|text-to-video", "Make videos from images, or from prompts alone.",
              "image-to-video"),
        _Flag(_SERVE, "served_model_name", str, "NAME", "Let clients call the model so.", shown="as --model"),
        _Flag(_SERVE, "store", Path, "DIR", "Keep jobs and their files in this folder.", Path("halovae-jobs")),
        _Flag(_SERVE, "keep", str, "TIME", "Keep jobs for so long after their end: 90s, 30m, 12h, 7d.", "7d",
              read=parse_keep),
    ),
    "Clients": (
        _Flag(_SERVE, "host", str, "ADDRESS", "Listen on this address; 0.0.0.0 is open to all machines.", "127.0.0.1"),
        _Flag(_SERVE, "port", int, "N", "Listen on this port; 0 takes any that is free.", 8000, least=0, most=65535),
        _Flag(_SERVE, "key", Path, "FILE", "Refuse requests that don't show the key in this file.",
              spelled="--api-key-file", read=read_key),
        _Flag(_SERVE, "max_queue", int, "N", "Let so many jobs wait at the most.", 64, least=1),
        _Flag(_SERVE, "max_upload", int, "MIB", "Refuse requests larger than this.", 32, least=1),
        _Flag(_SERVE, "max_pixels", int, "N", "Refuse frames of more pixels than this.", 1920 * 1088, least=1),
        _Flag(_SERVE, "max_frames", int, "N", "Refuse videos of more frames than this.", 257, least=1),
        _Flag(_SERVE, "max_steps", int, "N", "Refuse more steps of denoising than this.", 100, least=1),
    ),
    "Part and size of the clip": (
        _Flag(_PLAN | _WARM_UP, "height", int, "PIXELS", "For a clip this high.", ..., least=1),
        _Flag(_PLAN | _WARM_UP, "width", int, "PIXELS", "For a clip this wide.", ..., least=1),
        _Flag(_PLAN | _WARM_UP, "num_frames", int, "N", "For so many frames.", 1, least=1),
        _Flag(_DATASET, "bucket", list[str], "HxWxF", "Bring clips to this height, width and number of frames (HxW: "
              "images). Give it several times: each clip goes to the one of the nearest shape.", [], shown="none",
              check=_check_buckets("--bucket")),
        _Flag(_DATASET, "bucket_area", list[str], "HxWxF", "Make buckets of so many frames in all shapes of about this "
              "area, from 3:1 to 1:3.", [], shown="none", check=_check_buckets("--bucket-area")),
        _Flag(_DATASET, "bucket_step", int, "PIXELS", "Let their sides be multiples of this.", 32, least=1),
        _Flag(_DATASET, "fps", float, "N", "Sample so many frames per second.", shown="every frame",
              least=1e-6, most=1000),
        _Flag(_READ, "frames", str, "A:B", "Take frames A to B - 1, counted from 0.", shown="all", read=_frames),
        _Flag(_READ, "height", int, "PIXELS", "Make the clip this high: it is scaled to cover the size, and cropped "
              "around its centre.", shown="as in the file, or in proportion to --width", least=1),
        _Flag(_READ, "width", int, "PIXELS", "Make the clip this wide, in the same way.",
              shown="as in the file, or in proportion to --height", least=1),
    ),
    "What to make": (
        _Flag(_MADE, "prompt", str, "TEXT", "Show what this says."),
        _Flag(_MADE, "negative_prompt", str, "TEXT", "Keep away from what this says."),
        _Flag(_I2V | _I2I, "height", int, "PIXELS", "Make the result this high.", shown=_AS_IMAGE, least=1),
        _Flag(_I2V | _I2I, "width", int, "PIXELS", "Make the result this wide.", shown=_AS_IMAGE, least=1),
        _Flag(_T2V, "height", int, "PIXELS", "Make the result this high.", shown=_ITS_OWN, least=1),
        _Flag(_T2V, "width", int, "PIXELS", "Make the result this wide.", shown=_ITS_OWN, least=1),
        _Flag(_VIDEO, "num_frames", int, "N", "Make so many frames.", shown=_ITS_OWN, least=1),
        _Flag(_I2I, "strength", float, "SHARE", "Let so much of the image change, from 0 to 1.", shown=_ITS_OWN,
              least=0.0, most=1.0),
        _Flag(_MADE, "seed", int, "N", "Draw the noise from this seed.", shown="drawn once for all ranks, and told",
              least=0),
        _Flag(_VIDEO, "fps", int, "N", "Show so many frames per second.", 16, least=1, most=1000),
        _Flag(_VIDEO | _SERVE, "crf", int, "N", "Let the mp4 lose so much: 0 is nothing, which few players show, and "
              "51 is most.", shown="16", least=0, most=51),
        _Flag(_VIDEO | _SERVE | _DECODE | _ROUNDTRIP, "lossless", bool, None,
              "Keep every pixel of an mp4, as RGB: a larger file, which few players show.", False),
    ),
    "Denoising": (
        _Flag(_MADE, "num_inference_steps", int, "N", "Denoise in so many steps.", shown=_ITS_OWN, least=1),
        _Flag(_MADE, "guidance_scale", float, "SCALE", "Let the prompt count so much.", shown=_ITS_OWN),
        _Flag(_VIDEO, "guidance_scale_high", float, "SCALE", "Let the prompt count so much for the second expert "
              "(transformer_2; the pipeline's guidance_scale_2).", shown="as --guidance-scale"),
        _Flag(_I2I, "true_cfg_scale", float, "SCALE", "Let the prompt count so much against the negative one, in "
              "pipelines that know both scales.", shown=_ITS_OWN),
        _Flag(_VIDEO | _SERVE, "boundary_ratio", float, "SHARE",
              "Let the second expert take over below this noise level, from 0 to 1.", shown="the model's own",
              check=lambda share: Setup(boundary_ratio=share)),
        _Flag(_WHOLE, "flow_shift", float, "SHIFT", "Shift the scheduler's noise levels by this factor.",
              shown="the model's own", check=lambda shift: Setup(flow_shift=shift)),
    ),
    "Ranks": (
        _Flag(_RUN - _SERVE, "ranks", int, "N", "Start this many processes on this machine. Under torchrun leave it "
              "out: its processes are used.", shown="1", check=_check_ranks),
        _Flag(_SERVE, "ranks", int, "N", "Start this many processes on this machine.", shown="1", check=_check_ranks),
        _Flag(_DATASET, "devices", int, "N", "Encode on so many devices.", shown="all accelerators, or 1 cpu", least=1),
        _Flag(_DATASET, "ray_address", str, "ADDRESS", "Use the Ray cluster at this address: auto, or HOST:PORT.",
              shown="a local Ray that ends with the command"),
        _Flag(_DOCTOR, "ranks", int, "N", "How many ranks to try. Under torchrun leave it out.", shown="2",
              check=_check_ranks),
        _Flag(_PLAN, "ranks", str, "N,N,...", "Plan for these numbers of ranks; none is started.", "1,2,4,8",
              read=parse_counts),
        _Flag(_PLAN, "link", str, "nvlink|pcie|ethernet|measured", "Take this link between ranks: nvlink, pcie, "
              "ethernet, or measured between 2 ranks here.", "pcie"),
        _Flag(_WHOLE, "ulysses_degree", int, "N", "Let so many ranks share a sequence by attention heads.", 1,
              check=lambda n: Setup(ulysses_degree=n)),
        _Flag(_WHOLE, "ring_degree", int, "N", "Let so many ranks share a sequence by passing on keys and values.", 1,
              check=lambda n: Setup(ring_degree=n)),
    ),
    "How the VAE runs": (
        _Flag(_ALONE, "mode", str, _MODES, _MODE, shown=_OWN_MODE),
        _Flag(_WHOLE, "vae_mode", str, _MODES, _MODE, shown=_OWN_MODE),
        _Flag(_ALONE, "untiled", bool, None, _UNTILED, False),
        _Flag(_WHOLE, "vae_untiled", bool, None, _UNTILED, False),
        _Flag(_ALONE, "tile_size", str, "H,W", "Make tiles this high and wide, in pixels.", shown="the VAE's own",
              read=lambda text: parse_pair("--tile-size", text, least=1)),
        _Flag(_ALONE, "tile_overlap", str, "H,W", "Let tiles overlap by so many pixels.", shown="the VAE's own",
              read=lambda text: parse_pair("--tile-overlap", text, least=0)),
        _Flag(_ALONE, "vae_use_tiling", bool, None, _TILING.format("--mode tile"), False,
              spelled="--vae-use-tiling --vae_use_tiling"),
        _Flag(_WHOLE, "vae_use_tiling", bool, None, _TILING.format("--vae-mode tile"), False),
        _Flag(_WHOLE, "vae_use_slicing", bool, None, "Give the pictures of a batch to the VAE one by one.", False),
        _Flag(_WHOLE - _T2V, "vae_encode", bool, None, "Encode on all ranks together, or the whole on each.", True,
              spelled="--vae-encode/--no-vae-encode"),
        _Flag(_WHOLE, "vae_decode", bool, None, "Decode on all ranks together, or the whole on each.", True,
              spelled="--vae-decode/--no-vae-decode"),
        _Flag(_ALONE, "vae_patch_parallel_size", int, "N", _SIZE, shown="all", least=1,
              spelled="--vae-patch-parallel-size --vae_patch_parallel_size"),
        _Flag(_WHOLE, "vae_patch_parallel_size", int, "N", _SIZE, shown="all", least=1),
        _Flag(_RUN, "axis", str, "CUT", "Cut the picture like this in exact mode: auto, height, width, or ROWSxCOLS "
              "such as 2x4.", "auto", read=parse_axis),
    ),
    "Device, precision and memory": (
        _Flag(_WHOLE, "enable_layerwise_offload", bool, None,
              "Keep weights on the host, and fetch each layer when it is due.", False),
        _Flag(_WHOLE, "enable_cpu_offload", bool, None,
              "Keep weights on the host, and fetch each part of the pipeline when it is due.", False),
        _Flag(_RUN | _PLAN | _DATASET, "dtype", Dtype, "TYPE", "Compute with this number format: float32, float64, "
              "bfloat16 or float16.", shown="float32 on cpu, else bfloat16"),
        _Flag(_WHOLE, "vae_dtype", Dtype, "TYPE", "Let the VAE compute with this number format.", shown="as --dtype"),
        _Flag(_WHOLE - _T2V | _ROUNDTRIP | _PLAN, "vae_encode_dtype", Dtype, "TYPE",
              "Let the VAE encode in this number format.", shown="as the VAE"),
        _Flag(_WHOLE | _ROUNDTRIP | _PLAN, "vae_decode_dtype", Dtype, "TYPE",
              "Let the VAE decode in this number format.", shown="as the VAE"),
        _Flag(_WHOLE, "attention_backend", str, "NAME", "Use this attention in the transformer, by diffusers' name "
              "for it.", shown="diffusers' own"),
        _Flag(_WHOLE, "compile", bool, None, "Compile the transformer's blocks.", False),
        _Flag(_DATASET, "store_dtype", Dtype, "TYPE", "Keep latents in this number format.", shown="as --dtype"),
        _Flag(_RUN | _PLAN | _DOCTOR | _DATASET, "device", str, "KIND",
              "Run on this kind of device: cpu, cuda, npu, xpu, ...", shown="the accelerator if there is one",
              check=_check_device, is_slow=True),
        _Flag(_PLAN | _DATASET, "memory", float, "GIB", "Let each device have so much memory.",
              shown="what is free on this one", least=1e-6),
        _Flag(_PLAN, "flops", float, "TFLOPS", "Let each device compute so fast; goes with --bandwidth.",
              shown="measured here", least=1e-6),
        _Flag(_PLAN, "bandwidth", float, "GB", "Let each device move so much memory per second.", least=1e-6),
        _Flag(_DOCTOR, "clear_cache", bool, None, "Forget what trials have found out on this machine, and stop.",
              False),
    ),
    "What to tell": (
        _Flag(_COMPARE, "min_ssim", float, "VALUE", "Fail if a frame's SSIM is below this.", least=-1, most=1),
        _Flag(_COMPARE, "min_psnr", float, "DB", "Fail if a frame's PSNR is below this."),
        _Flag(_COMPARE, "max_l2", float, "VALUE", "Latents: fail if a frame's relative L2 is above.", least=0),
        _Flag(_COMPARE, "grid", str, "HxW[+O]", "Tiles every H rows and W columns, overlapping by O: measure seams "
              "there.", shown="no seams are measured", read=parse_grid),
        _Flag(_COMPARE, "trim", bool, None, "Compare what two files of different lengths or sizes share: larger "
              "pictures are cropped around the centre, not scaled; latents have to be of one size.", False),
        _Flag(_DATASET, "fail_fast", bool, None, "Stop at the first clip that can't be encoded: exit code 2.",
              False),
        _Flag(_DATASET, "dry_run", bool, None, "Look at the clips, print the plan and stop: nothing is written.",
              False),
        _Flag(_MADE, "dry_run", bool, None, "Print the plan and stop: only configs are loaded, nothing is started.",
              False),
        _Flag(_ROUNDTRIP, "compare", bool, None, "Run the VAE on one rank too, and tell how far the results differ.",
              False),
        _Flag(_MADE | _ALONE | _PLAN | _COMPARE | _DATASET, "json", Path, "FILE",
              "Write the numbers to this file, too.", check=check_written),
        _Flag(_MADE | _ROUNDTRIP | _COMPARE | _DATASET, "report", Path, "DIR",
              "Write a page with pictures and numbers to this folder.",
              check=lambda folder: check_written(None, folder)),
    ),
}
# fmt: on


# ---- what is told of wrong flags and values, all of it at once; what --help looks like -------------------------------
#
# Typer's own groups of options need its boxes, which cut the names of long options in a terminal of usual width.

# Wrong flags and values. Typer has had click's errors under more than one name; this one is always its parent.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
_OTHER = "Options"
_HYPHEN = "\N{NON-BREAKING HYPHEN}"
_WIDTH = 100
"""Of text, in a terminal that is wide enough."""


class Command(TyperCommand):
    """A command whose options are listed by their `rich_help_panel`, and its epilog as an example, line by line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.context_settings["max_content_width"] = _WIDTH

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's, which stops at the first fault.

        Raises:
            InputError: one line for each flag, argument and value that is wrong by itself.
        """
        words, faults, rest = list(args), Faults(), list[str]()
        try:
            rest = super().parse_args(ctx, args)
        except USAGE_ERROR as error:
            self._note_all(ctx, words, faults)
            if not faults:
                faults.add(one_line(error))
        known: Iterable[Any] = getattr(self.callback, "flags", ())
        for flag in sorted(known, key=lambda flag: flag.is_slow):
            if ctx.params.get(flag.name) is not None and (faults or not flag.is_slow):
                with faults.noted():
                    ctx.params[flag.name] = flag.value(ctx.params[flag.name])
        faults.check()
        return rest

    def _note_all(self, ctx: Any, words: list[str], faults: Faults) -> None:
        """Read word by word what can't be read as a whole."""
        while True:
            try:
                given, _, _ = self.make_parser(ctx).parse_args(args=list(words))
                break
            except USAGE_ERROR as error:
                faults.add(one_line(error))
                # Where a flag is unknown, so is whether the next word belongs to it.
                wrong = getattr(error, "option_name", None)
                left = [word for word in words if word.partition("=")[0] != wrong]
                if len(left) == len(words):
                    return
                words = left
        gives = {flag.name: flag.gives for flag in getattr(self.callback, "flags", ())}
        for parameter in self.get_params(ctx):
            if parameter.is_eager or (faults and parameter.param_type_name == "argument"):
                continue
            try:
                parameter.handle_parse_result(ctx, given, [])
            except USAGE_ERROR as error:
                value, wanted = given.get(parameter.name), gives.get(parameter.name)
                told = (
                    f"{parameter.opts[0]} {value}: give {wanted}" if value is not None and wanted else one_line(error)
                )
                faults.add(told)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records: list[tuple[str, tuple[str, str]]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                records.append((_ARGUMENTS if argument else _panel(parameter), record))
        _write(formatter, records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Example"):
                formatter.write(
                    "".join(f"{' ' * formatter.current_indent}{line}\n" for line in self.epilog.splitlines())
                )


class CommandGroup(TyperGroup):
    """A group whose commands are listed by their `rich_help_panel`, each with all that its summary says."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        _write(formatter, [(_panel(one), (name, (one.help or "").splitlines()[0])) for name, one in commands if one])


def one_line(error: Any) -> str:
    """What is wrong with the words of a command line; where one is not known, or is missing, also where all are."""
    told = " ".join(error.format_message().split()).rstrip(".")
    if not error.ctx or not told.startswith(("No such ", "Missing ")):
        return told
    return f"{told}{' See' if told.endswith('?') else '; see'} {error.ctx.command_path} --help"


def _panel(item: Any) -> str:
    panel = getattr(item, "rich_help_panel", None)
    return panel if isinstance(panel, str) else _OTHER


def _write(formatter: Any, records: Iterable[tuple[str, tuple[str, str]]]) -> None:
    """Groups in the order of their first members."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for panel, record in records:
        groups.setdefault(panel, []).append(record)
    for panel, members in groups.items():
        with formatter.section(panel):
            # Names with hyphens are copied from here, so no line ends within one.
            formatter.write_dl([(name, re.sub(r"(?<=\w)-(?=\w)", _HYPHEN, words)) for name, words in members])
    formatter.buffer[:] = [text.replace(_HYPHEN, "-") for text in formatter.buffer]
