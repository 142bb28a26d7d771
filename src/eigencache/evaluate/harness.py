"""Any task of lm-evaluation-harness runs through the cache: lm-eval's model `eigencache` reads contexts held encoded.

Needs the package `lm-eval` (the extra `eigencache[eval]`). Importing this module registers the model; from a shell:

    python -m eigencache.evaluate.harness run --model eigencache --model_args pretrained=ref-llama,codec=16bit --tasks …

Requests are read one by one, because padding is not known to a cache.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigencache.codec.base import Codec, SixteenBit
from eigencache.codec.saved.folder import load_codec
from eigencache.errors import CodecError, ModelError
from eigencache.evaluate.prefix import Prefix, Window, read, read_prefix
from eigencache.models.codec_check import codec_for
from eigencache.models.load import LoadedModel, load

try:
    import lm_eval.models  # noqa: F401 - first: lm-eval registers its own models only into an empty registry
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ModelError(f"lm-eval cannot be imported ({error}): pip install 'eigencache[eval]'") from error

CODECS = ("none", "16bit")
MAX_NEW_TOKENS = 256  # lm-eval's own default for tasks that name no limit


@register_model("eigencache")
class CodecLM(TemplateLM):
    """A causal model whose context is held encoded while a continuation is scored or generated.

    `pretrained`: a model spec of `load`, or a loaded model. `codec`: `none` (an ordinary cache), `16bit`, the folder of a
    codec that was fitted on this model (`eigencache evaluate --save-codec`), or a codec.
    `window`, `block`: as in `CodecCache`. `chunk`: how many tokens of a rolling text are read at a time; all older than
    the window are held encoded. Raises `ModelError` and `CodecError` in one line.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel,
        codec: str | Codec = "none",
        *,
        window: int = 0,
        block: int = 1,
        chunk: int = 256,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1" or max_batch_size not in (None, 1):
            raise ModelError(f"--batch_size {batch_size}: a cache does not know padding: use --batch_size 1")
        if chunk < 1:
            raise ModelError(f"chunk={chunk}: at least one token has to be read at a time")
        self.loaded = (
            load(pretrained, device=device, dtype=dtype, tokenizer=tokenizer) if isinstance(pretrained, str) else pretrained
        )
        # lm-eval makes a number of a folder's name that looks like one
        self.codec = _codec(str(codec), self.loaded) if isinstance(codec, str | int) else codec
        self.tokenizer: Any = self.loaded.tokenizer
        self.window, self.chunk = Window(window, block), chunk
        self.max_length = _max_length(self.loaded, max_length)
        self._device = self.loaded.device
        self._last: tuple[list[int], Prefix] | None = None  # choices of one question share their context

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text. Raises `ModelError` for a tokenizer without one."""
        if self.tokenizer.eos_token_id is None:
            raise ModelError(f"{self.loaded.name}: the tokenizer has no token that ends a text, lm-eval needs one")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: the tokenizer's bos, its eos without one."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Under which name lm-eval keeps requests of a chat template."""
        return self.loaded.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; special tokens are added as the tokenizer does, unless told otherwise or already there."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, **kwargs)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The tokenizer's template as text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """All but the last token of a context is held encoded; the continuation is scored through it.

        A context that is too long loses its start. Raises `ModelError` for a continuation that does not fit alone.
        """
        answers = []
        for strings, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ModelError(
                    f"{self.loaded.name}: a continuation of {len(continuation)} tokens is longer than "
                    f"max_length={self.max_length}"
                )
            ids = (context + continuation)[-(self.max_length + 1) :]
            answers.append(self._scored(ids[: len(ids) - len(continuation)], continuation))
            self.cache_hook.add_partial("loglikelihood", strings, answers[-1])
        return answers

    @torch.no_grad()
    def _scored(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-probability in nats of the continuation, and whether each of its tokens is ranked first."""
        if not continuation:
            return 0.0, True
        piece = self._tensor([*context[-1:], *continuation[:-1]])
        logits = self._prefix(context[:-1]).logits(piece, self.codec, self.window)
        targets = self._tensor(continuation)
        return _log_probability(logits, targets), bool((logits.argmax(-1) == targets).all())

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of whole texts, read in chunks: all older than the window is held encoded."""
        totals = []
        for string in (request.args[0] for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(string, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            totals.append(sum(self._rolled(*make_disjoint_window(window)) for window in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), totals[-1])
        return totals

    def _rolled(self, context: list[int], continuation: list[int]) -> float:
        ids = self._tensor(context + continuation)
        cache = self._prefix([]).cache(self.codec, self.window)
        total = 0.0
        for start, stop in _chunks(ids.shape[1] - 1, self.chunk):
            logits = read(self.loaded, ids[:, start:stop], cache)
            scored = max(start, len(context) - 1)
            if scored < stop:
                total += _log_probability(logits[:, scored - start :], ids[:, scored + 1 : stop + 1])
        return total

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text that follows each context, up to a stop string or `max_gen_toks`; greedy unless the task samples.

        Every generated token reads its past through the cache. Raises `ModelError` where no context would be left.
        """
        texts = []
        for request in requests:
            context, settings = request.args  # type: ignore[misc] - by the kind of request
            texts.append(self._generated(context, copy.deepcopy(settings)))
            self.cache_hook.add_partial("generate_until", (context, settings), texts[-1])
        return texts

    def _generated(self, context: str, settings: dict[str, Any]) -> str:
        given_stops = settings.pop("until", None) or []
        stops = [given_stops] if isinstance(given_stops, str) else given_stops
        until = [stop for stop in (*stops, self.tokenizer.decode([self.eot_token_id])) if stop]
        new_tokens = int(settings.pop("max_gen_toks", MAX_NEW_TOKENS))
        if new_tokens >= self.max_length:
            raise ModelError(f"max_gen_toks={new_tokens} leaves no room for a context in max_length={self.max_length}")
        settings["do_sample"] = settings.get("do_sample", float(settings.get("temperature", 0.0)) > 0)
        if not settings["do_sample"]:
            settings.pop("temperature", None)
        ids = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - new_tokens) :]
        given = self._tensor(ids)

        def stopped(row: Tensor) -> bool:
            text = self.tokenizer.decode(row[len(ids) :])
            return any(stop in text for stop in until)

        out = self.loaded.model.generate(  # type: ignore[operator]
            input_ids=given,
            attention_mask=torch.ones_like(given),
            past_key_values=self._prefix(ids[:-1]).cache(self.codec, self.window),
            max_new_tokens=new_tokens,
            stopping_criteria=[lambda rows, _: torch.tensor([stopped(row) for row in rows], device=rows.device)],
            **settings,
        )
        text = self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        for stop in until:
            text = text.split(stop)[0]
        return text

    def _prefix(self, ids: list[int]) -> Prefix:
        if self._last is None or self._last[0] != ids:
            self._last = ids, read_prefix(self.loaded, self._tensor(ids))
        return self._last[1]

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.int64, device=self.loaded.device)


def _codec(name: str, loaded: LoadedModel) -> Codec | None:
    if name in CODECS:
        return None if name == "none" else SixteenBit(loaded.model.dtype)
    if not Path(name).is_dir():
        raise CodecError(
            f"codec={name}: no such codec; use {' or '.join(CODECS)}, a folder that `eigencache evaluate --save-codec` "
            "wrote, or pass a codec object from Python"
        )
    return codec_for(load_codec(name), loaded)


def _max_length(loaded: LoadedModel, wanted: int | None) -> int:
    positions = getattr(loaded.model.config, "max_position_embeddings", None)
    if wanted is None and positions is None:
        raise ModelError(f"{loaded.name}: the configuration names no longest text: give max_length=…")
    if wanted is not None and not 2 <= wanted <= (loaded.learned_positions or wanted):
        raise ModelError(f"max_length={wanted}: {loaded.name} reads from 2 to {positions} tokens")
    return int(wanted or positions)  # type: ignore[arg-type]


def _chunks(length: int, chunk: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + chunk, length)) for start in range(0, length, chunk))


def _log_probability(logits: Tensor, targets: Tensor) -> float:
    return float(logits.float().log_softmax(-1).gather(-1, targets[..., None]).double().sum())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
