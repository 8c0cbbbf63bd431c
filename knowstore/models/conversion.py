"""GGUF to a directory of safetensors, once per file: reading the GGUF takes half a minute, the directory a second."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from knowstore.errors import ConfigError, ModelNotFoundError
from knowstore.models.files import making_directory, read_marker, write_marker
from knowstore.models.fingerprints import file_digest

Progress = Callable[[str, int, int], None]


def converted_path(gguf: Path, cache_dir: Path) -> Path:
    """Where the conversion of this file's content lives in the cache, converted yet or not."""
    stem = re.sub(r"[^\w.-]", "_", gguf.stem)
    return cache_dir / "converted" / f"{stem}-{file_digest(gguf, cache_dir=cache_dir)[:16]}"


def convert_gguf(gguf: Path, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Convert a causal LM in GGUF into a directory that `from_pretrained` reads, or find it converted already.

    Weights are dequantised to bfloat16. Two processes convert once, and a conversion that was cut off is
    made again.

    Args:
        gguf: the file.
        cache_dir: the conversion goes under `converted/` here.
        progress: called with what is being done, steps done and steps in all.

    Raises:
        ModelNotFoundError: not a GGUF file, or of an architecture that transformers cannot read.
        ConfigError: the cache cannot be written, or the disk is full; nothing is left behind.
    """
    if not gguf.is_file():
        raise ModelNotFoundError(f"there is no file {gguf}", kept="nothing was converted", fix="check the path")
    target = converted_path(gguf, cache_dir)
    if read_marker(target) is not None:
        return target
    with making_directory(target, is_complete=lambda: read_marker(target) is not None) as folder:
        if folder is not None:
            try:
                _convert(gguf, folder, progress)
            except OSError as error:
                if error.errno is None:
                    raise _unreadable(gguf, error) from error
                raise ConfigError(
                    f"{gguf.name} could not be converted into {target.parent}: {error}",
                    kept="nothing was left in the cache",
                    fix="free disk space there (about three times the file), or set XDG_CACHE_HOME",
                ) from error
            except (ValueError, KeyError, IndexError, NotImplementedError, RuntimeError) as error:
                raise _unreadable(gguf, error) from error
            write_marker(folder, gguf.name, file_digest(gguf, cache_dir=cache_dir))
    return target


def _unreadable(gguf: Path, error: Exception) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{gguf} cannot be read as a GGUF language model: {error}",
        kept="nothing was converted",
        fix="give a whole GGUF file of an architecture that transformers reads, or a directory of safetensors",
    )


def _convert(gguf: Path, folder: Path, progress: Progress | None) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    def report(done: int) -> None:
        if progress is not None:
            progress(f"converting {gguf.name}", done, 4)

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _quiet_transformers():
        report(0)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        report(1)
        config = AutoConfig.from_pretrained(**source)
        report(2)
        model: Any = AutoModelForCausalLM.from_pretrained(
            **source, config=config, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        report(3)
        # save_pretrained refuses a model that still claims to be quantised
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        report(4)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hold back the bars and reports of transformers, the GGUF reader's own bar among them."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    def without_bar(items: Iterable[Any], **_options: object) -> Iterable[Any]:
        return items

    logging: Any = transformers_logging
    reader: Any = modeling_gguf_pytorch_utils
    verbosity, has_bars, bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), reader.tqdm
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    reader.tqdm = without_bar
    try:
        yield
    finally:
        reader.tqdm = bar
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
