"""Generation by Transformers' own `generate`, for any causal language model, with adapters or without.

Shape legend: B prompts, S positions of the longest prompt, N new positions.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from fourfold.base.errors import ModelError
from fourfold.base.peft import PeftModel
from fourfold.config.schema import Run
from fourfold.dataset.render import Renderer
from fourfold.generate.interface import Sampling
from fourfold.models.inference import inference_device, load_for_inference


class HuggingFaceEngine:
    """Generates with one model in this process; not for two calls at a time.

    Args:
        model: on its device; put into evaluation mode for the length of a call.
        tokenizer: decodes what is streamed.
        stop_token_ids: each of them ends an answer and is not part of it.
        skip_special_tokens: leave special tokens out of streamed text.
        use_cache: keep keys and values between tokens; without, each token costs a forward pass over all.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        use_cache: bool = True,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._stop_token_ids = list(stop_token_ids)
        self._skip_special_tokens, self._use_cache = skip_special_tokens, use_cache
        # a model without positions (a state-space model) does not have the entry
        self._context_length: int | None = model.config.get_text_config().to_dict().get("max_position_embeddings")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """The new tokens of each prompt, without the prompt and without the stop token.

        Raises:
            ModelError: a prompt leaves no room for an answer in the model's context.
        """
        new_tokens = self._run(prompts, sampling)
        return [self._until_stop(row) for row in new_tokens.tolist()]

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Generator[str, None, None]:
        """The answer to one prompt as pieces of text, as they come.

        Closing the iterator early stops the generation at the next token.

        Raises:
            ModelError: the prompt leaves no room for an answer in the model's context.
        """
        if sampling.num_beams > 1:  # beams are not final before the last token
            yield self._decode(self.generate([prompt], sampling)[0])
            return
        pieces = _Pieces(self._tokenizer, self._stop_token_ids, self._skip_special_tokens)
        stopped = threading.Event()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self._run([prompt], sampling, pieces, _Stopped(stopped))
            except BaseException as error:
                failures.append(error)
            finally:
                pieces.close()

        worker = threading.Thread(target=work, name="generate", daemon=True)
        worker.start()
        try:
            yield from pieces
        finally:
            stopped.set()
            worker.join()
        if failures:
            raise failures[0]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        pieces: _Pieces | None = None,
        stopped: _Stopped | None = None,
    ) -> Tensor:
        """New tokens of each prompt, [B, N] int64, filled up with padding after a stop token."""
        input_ids, attention_mask = self._pad_left(prompts)
        config = self._generation_config(sampling, input_ids.shape[1])
        with _evaluating(self._model), _seeded(sampling.seed, input_ids.device):
            output = self._model.generate(  # type: ignore[operator]  # PeftModel hands it on to the model it wraps
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=config,
                streamer=pieces,
                stopping_criteria=StoppingCriteriaList([stopped] if stopped is not None else []),
            )
        assert isinstance(output, Tensor), "return_dict_in_generate is not asked for"
        return output[:, input_ids.shape[1] :]

    def _generation_config(self, sampling: Sampling, prompt_length: int) -> GenerationConfig:
        """Every figure is set: what is left open would be taken from the model's own generation config."""
        sample = sampling.do_sample and sampling.temperature > 0
        beams = sampling.num_beams > 1
        return GenerationConfig(
            do_sample=sample,
            temperature=sampling.temperature if sample else 1.0,
            top_p=sampling.top_p if sample else 1.0,
            top_k=sampling.top_k if sample else 50,
            num_beams=sampling.num_beams,
            length_penalty=sampling.length_penalty if beams else 1.0,
            repetition_penalty=sampling.repetition_penalty,
            max_new_tokens=self._room(sampling, prompt_length),
            eos_token_id=self._stop_token_ids,
            pad_token_id=self._pad_token_id,
            use_cache=self._use_cache,
        )

    def _room(self, sampling: Sampling, prompt_length: int) -> int:
        """How many tokens an answer may have: as many as asked for, at most to the end of the model's context."""
        longest = self._context_length
        if sampling.max_length is not None:
            longest = sampling.max_length if longest is None else min(longest, sampling.max_length)
        if longest is None:
            return sampling.max_new_tokens
        if prompt_length >= longest:
            raise ModelError(
                f"The conversation has {prompt_length} tokens, but prompt and answer together may have {longest}. "
                "Shorten it, or begin a new one."
            )
        wanted = longest if sampling.max_length is not None else sampling.max_new_tokens
        return min(wanted, longest - prompt_length)

    @property
    def _pad_token_id(self) -> int:
        own = self._tokenizer.pad_token_id
        return own if isinstance(own, int) else next(iter(self._stop_token_ids), 0)

    def _pad_left(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both [B, S] int64; the last token of each prompt is in the last column."""
        length = max(len(prompt) for prompt in prompts)
        rows = [[self._pad_token_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
        masks = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(rows, device=self._model.device), torch.tensor(masks, device=self._model.device)

    def _until_stop(self, tokens: list[int]) -> list[int]:
        ends = [position for position, token in enumerate(tokens) if token in self._stop_token_ids]
        return tokens[: ends[0]] if ends else tokens

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special_tokens)
        assert isinstance(text, str), "one sequence gives one text"
        return text


def build(run: Run, tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> HuggingFaceEngine:
    """Load the model of a config, on the GPU if there is one, and the engine on it.

    Raises:
        ConfigError: keys that contradict each other or this machine.
        ModelError: a model or adapter that cannot be loaded.
    """
    return HuggingFaceEngine(
        load_for_inference(run, tokenizer, inference_device(run)),
        tokenizer,
        renderer.stop_token_ids,
        skip_special_tokens=run.generation.skip_special_tokens,
        use_cache=run.model.use_kv_cache,
    )


class _Pieces(TextIteratorStreamer):
    """Text as it comes, without stop tokens, also when special tokens are shown."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=skip_special_tokens)
        self._stop_token_ids = torch.tensor(list(stop_token_ids), dtype=torch.int64)

    def put(self, value: Tensor) -> None:
        """Takes the prompt ([1, S]) first, then each new token ([1])."""
        if self.next_tokens_are_prompt or not bool(torch.isin(value, self._stop_token_ids).all()):
            super().put(value)

    def close(self) -> None:
        """Ends the iteration, also after a failure that `end` never heard of."""
        self.text_queue.put(self.stop_signal, timeout=self.timeout)


class _Stopped(StoppingCriteria):
    """Ends the generation once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:  # type: ignore[override]
        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """With a seed, the same tokens each time, and torch's own random state as it was."""
    devices = [device] if device.type == "cuda" else []
    with nullcontext() if seed is None else torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield
