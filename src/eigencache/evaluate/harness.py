"""Run any task of lm-evaluation-harness with an encoded cache, by the lm-eval model `eigencache`.

Needs the package `lm-eval` (the extra `eigencache[eval]`). Importing this module registers the model. From a shell:

    python -m eigencache.evaluate.harness run --model eigencache --model_args pretrained=ref-llama,codec=16bit --tasks …

Requests run one at a time, because an encoded cache does not support padding.
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
MAX_NEW_TOKENS = 256  # lm-eval's default for tasks without a limit


@register_model("eigencache")
class CodecLM(TemplateLM):
    """lm-eval model that encodes the cached context before a continuation is scored or generated.

    Args:
        pretrained: A model specification of `load`, or a loaded model.
        codec: `none` (ordinary cache), `16bit`, the folder of a codec fitted on this model
            (`eigencache evaluate --save-codec`), or a codec object.
        window: Most recent tokens that stay uncompressed, as in `CodecCache`.
        block: Tokens that are encoded together, as in `CodecCache`.
        chunk: Tokens per forward pass of `loglikelihood_rolling`.
        max_length: Longest text in tokens. Default: the model's `max_position_embeddings`.
        batch_size: Must be 1. lm-eval passes it.
        max_batch_size: Must be None or 1. lm-eval passes it.
        device: Device to load the model on. Default: chosen by `load`.
        dtype: Dtype to load the model in. Default: chosen by `load`.
        tokenizer: Tokenizer to load. Default: the model's.

    Raises:
        ModelError: The model cannot be loaded, or an argument is out of range.
        CodecError: The codec does not exist or does not fit the model.
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
            raise ModelError(
                f"`batch_size` {batch_size}, `max_batch_size` {max_batch_size}: an encoded cache does not support padding. "
                "Use 1 for both."
            )
        if chunk < 1:
            raise ModelError(f"`chunk` {chunk}: must be at least 1")
        self.loaded = (
            load(pretrained, device=device, dtype=dtype, tokenizer=tokenizer) if isinstance(pretrained, str) else pretrained
        )
        # lm-eval parses a folder name of digits as an integer
        self.codec = _codec(str(codec), self.loaded) if isinstance(codec, str | int) else codec
        self.tokenizer: Any = self.loaded.tokenizer
        self.window, self.chunk = Window(window, block), chunk
        self.max_length = _max_length(self.loaded, max_length)
        self._device = self.loaded.device
        self._last: tuple[list[int], Prefix] | None = None  # cached: answer choices of one question share their context

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token. Raises `ModelError` if the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise ModelError(f"{self.loaded.name}: the tokenizer has no eos token, which lm-eval needs. Set one.")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Id that replaces an empty context: the bos token, or the eos token if there is no bos token."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval caches requests that use a chat template."""
        return self.loaded.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text.

        Args:
            string: Text to encode.
            add_special_tokens: Whether the tokenizer adds special tokens. Default: unless the text begins with bos.
            **kwargs: Passed to the tokenizer's `encode`.
        """
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, **kwargs)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat history as text in the tokenizer's chat template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations after contexts, of which all but the last token is encoded.

        Contexts that are too long are truncated on the left.

        Raises:
            ModelError: A continuation alone is longer than `max_length`.
        """
        answers = []
        for strings, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ModelError(
                    f"{self.loaded.name}: a continuation of {len(continuation)} tokens is longer than "
                    f"`max_length` {self.max_length}. Raise `max_length`."
                )
            ids = (context + continuation)[-(self.max_length + 1) :]
            answers.append(self._scored(ids[: len(ids) - len(continuation)], continuation))
            self.cache_hook.add_partial("loglikelihood", strings, answers[-1])
        return answers

    @torch.no_grad()
    def _scored(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Return the log-probability of the continuation in nats, and whether greedy decoding produces it."""
        if not continuation:
            return 0.0, True
        piece = self._tensor([*context[-1:], *continuation[:-1]])
        logits = self._prefix(context[:-1]).logits(piece, self.codec, self.window)
        targets = self._tensor(continuation)
        return _log_probability(logits, targets), bool((logits.argmax(-1) == targets).all())

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts in nats.

        Texts are read `chunk` tokens at a time. All tokens older than the window are encoded.

        Args:
            requests: lm-eval requests; the first argument of each is the text.
            disable_tqdm: Ignored; part of lm-eval's interface.
        """
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
        """Return the text generated after each context, up to a stop string or `max_gen_toks` tokens.

        Decoding is greedy unless the task asks for sampling. All tokens are generated with the encoded cache.

        Args:
            requests: lm-eval requests; the arguments of each are the context and generation settings.
            disable_tqdm: Ignored; part of lm-eval's interface.

        Raises:
            ModelError: `max_gen_toks` leaves no room for a context.
        """
        texts = []
        for request in requests:
            context, settings = request.args  # type: ignore[misc] - by the kind of request
            texts.append(self._generated(context, copy.deepcopy(settings)))
            self.cache_hook.add_partial("generate_until", (context, settings), texts[-1])
        return texts

    def _generated(self, context: str, settings: dict[str, Any]) -> str:
        task_stops = settings.pop("until", None) or []
        stops = [task_stops] if isinstance(task_stops, str) else task_stops
        until = [stop for stop in (*stops, self.tokenizer.decode([self.eot_token_id])) if stop]
        new_tokens = int(settings.pop("max_gen_toks", MAX_NEW_TOKENS))
        if new_tokens >= self.max_length:
            raise ModelError(
                f"`max_gen_toks` {new_tokens} leaves no room for a context in `max_length` {self.max_length}. "
                "Lower `max_gen_toks` or raise `max_length`."
            )
        settings["do_sample"] = settings.get("do_sample", float(settings.get("temperature", 0.0)) > 0)
        if not settings["do_sample"]:
            settings.pop("temperature", None)
        ids = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - new_tokens) :]
        prompt = self._tensor(ids)

        def stopped(row: Tensor) -> bool:
            text = self.tokenizer.decode(row[len(ids) :])
            return any(stop in text for stop in until)

        out = self.loaded.model.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
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
            f"`codec` {name}: no such codec. Use {' or '.join(CODECS)}, a folder written by "
            "`eigencache evaluate --save-codec`, or, from Python, a codec object."
        )
    return codec_for(load_codec(name), loaded)


def _max_length(loaded: LoadedModel, wanted: int | None) -> int:
    positions = getattr(loaded.model.config, "max_position_embeddings", None)
    if wanted is None and positions is None:
        raise ModelError(f"{loaded.name}: the configuration has no `max_position_embeddings`. Set `max_length`.")
    if wanted is not None and not 2 <= wanted <= (loaded.learned_positions or wanted):
        raise ModelError(f"`max_length` {wanted}: {loaded.name} accepts 2 to {positions} tokens")
    return int(wanted or positions)  # type: ignore[arg-type]


def _chunks(length: int, chunk: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + chunk, length)) for start in range(0, length, chunk))


def _log_probability(logits: Tensor, targets: Tensor) -> float:
    return float(logits.float().log_softmax(-1).gather(-1, targets[..., None]).double().sum())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
