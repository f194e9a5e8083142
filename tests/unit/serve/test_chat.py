import io
import json
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from fourfold.base.errors import ConfigError, ModelError
from fourfold.config.load import load
from fourfold.dataset.render import Renderer
from fourfold.dataset.template import load_template
from fourfold.generate.interface import Sampling
from fourfold.serve import chat as chat_module
from fourfold.serve.chat import HELP, converse, piped_screen
from fourfold.serve.infer import answer
from fourfold.serve.session import ChatSession
from fourfold.serve.speaker import load_speaker, sampling_of
from tiny_models import save_tiny_model, tiny_tokenizer

TOOL_CALL = 'Action: get_weather\nAction Input: {"city": "Oslo"}'
TOOLS = [
    {"name": "get_weather", "description": "Weather of a city", "parameters": {"type": "object", "properties": {}}}
]


class ScriptedEngine:
    """Says what it is told to, in two pieces, and keeps the prompts; an `interrupt` in the script is a Ctrl-C."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers, self.prompts = list(answers), []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        raise NotImplementedError

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Generator[str, None, None]:
        self.prompts.append(tiny_tokenizer().decode(prompt))
        text, interrupted, _ = self.answers.pop(0).partition("<interrupt>")
        yield text[:3]
        yield text[3:]
        if interrupted:
            raise KeyboardInterrupt


def session_of(*answers: str) -> tuple[ChatSession, ScriptedEngine]:
    engine = ScriptedEngine(answers)
    tokenizer = tiny_tokenizer()
    renderer = Renderer(load_template("chatml", tokenizer), tokenizer)
    return ChatSession(engine, renderer, Sampling()), engine


def talk(session: ChatSession, *lines: str) -> str:
    output = io.StringIO()
    converse(session, piped_screen(io.StringIO("".join(f"{line}\n" for line in lines)), output))
    return output.getvalue()


def test_second_question_sees_the_first_and_its_answer():
    session, engine = session_of("I am Four.", "Twice.")
    shown = talk(session, "Who are you?", "", "Again?", "exit", "never read")
    assert (
        shown
        == "\nUser: Who are you?\nAssistant: I am Four.\n\nUser: \n\nUser: Again?\nAssistant: Twice.\n\nUser: exit\n"
    )
    assert engine.prompts[1].endswith(
        "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\nI am Four.<|im_end|>\n"
        "<|im_start|>user\nAgain?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_clear_forgets_the_conversation_but_not_the_system_prompt():
    session, engine = session_of("One.", "Two.")
    shown = talk(session, "/system Be brief.", "First", "clear", "Second")
    assert "The conversation is forgotten." in shown
    assert engine.prompts[1] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSecond<|im_end|>\n<|im_start|>assistant\n"
    )


def test_command_that_there_is_not_is_answered_with_those_that_there_are():
    session, engine = session_of("A path.", "A word.", "Both.")
    shown = talk(session, "/foo", "/sytem Be brief.", "/usr/bin is what?", "//foo is what?")
    assert shown.count(f"There is no command /foo.\n{HELP}") == 1
    assert "There is no command /sytem.\n" in shown
    assert len(engine.prompts) == 2
    assert "user\n/usr/bin is what?<|im_end|>" in engine.prompts[0]
    assert engine.prompts[1].endswith("user\n/foo is what?<|im_end|>\n<|im_start|>assistant\n")


def test_tool_result_that_looks_like_a_command_is_a_result(tmp_path: Path):
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    session, engine = session_of(TOOL_CALL, "It is a folder.")
    talk(session, f"/tools {file}", "Where?", "/home")
    assert "/home" in engine.prompts[1]


def test_interrupt_stops_the_answer_and_keeps_what_was_said():
    session, engine = session_of("I was about<interrupt>", "Go on.")
    assert "Assistant: I was about [stopped]\n" in talk(session, "Speak", "And?")
    assert "<|im_start|>assistant\nI was about<|im_end|>" in engine.prompts[1]


def test_stream_closed_early_keeps_what_was_said():
    session, _ = session_of("I was about to say")
    pieces = session.ask("Speak")
    assert next(pieces) == "I w"
    pieces.close()
    assert [message.text for message in session.history] == ["Speak", "I w"]


def test_tool_call_is_shown_parsed_and_the_next_line_is_its_result(tmp_path: Path):
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    session, engine = session_of(TOOL_CALL, "It rains.")
    shown = talk(session, f"/tools {file}", "Weather in Oslo?", '{"rain": true}')
    assert 'Tool call: get_weather({"city": "Oslo"})\n\nTool result: {"rain": true}\nAssistant: It rains.\n' in shown
    assert "get_weather" in engine.prompts[0]
    assert '{"rain": true}' in engine.prompts[1]
    assert [message.role for message in session.history] == ["user", "function", "observation", "assistant"]


@pytest.mark.parametrize("content", ["no json", '{"name": "x"}', "[1]"])
def test_bad_tools_file_is_one_clear_line(content: str, tmp_path: Path):
    file = tmp_path / "tools.json"
    file.write_text(content)
    session, _ = session_of()
    assert f"{file}: /tools: " in talk(session, f"/tools {file}")
    assert session.tools == ""


def test_text_that_looks_like_a_tool_call_is_text_without_tools():
    session, _ = session_of(TOOL_CALL)
    assert "Tool call" not in talk(session, "Weather?")
    assert session.history[1].role == "assistant"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def run_of(folder: Path, **keys: object):
    return load({"model_name_or_path": str(folder), "do_sample": False, "max_new_tokens": 8, **keys}, verb="chat")


def test_chat_with_a_model_answers_as_infer_does(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = run_of(model_folder, default_system="You are tiny.")
    expected = answer(run, ["Who are you?", "Really?"])
    assert len(expected) == 2
    assert all(expected)
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\n"))
    chat_module.chat(run)
    assert f"User: Who are you?\nAssistant: {expected[0]}\n" in capsys.readouterr().out


def test_conversation_beyond_the_context_is_one_clear_line(model_folder: Path):
    speaker = load_speaker(run_of(model_folder))
    session = ChatSession(speaker.engine, speaker.renderer, speaker.sampling)
    assert "prompt and answer together may have 256. Shorten it" in talk(session, "word " * 300)
    assert session.history == []
    with pytest.raises(ModelError):
        list(session.ask("word " * 300))


def test_vllm_is_refused_with_the_way_out(model_folder: Path):
    run = load({"model_name_or_path": str(model_folder), "infer_backend": "vllm"})
    with pytest.raises(ConfigError, match=r"infer_backend: 'vllm' .* Use infer_backend: huggingface"):
        load_speaker(run)


def test_float16_on_a_cpu_is_refused_with_the_way_out(model_folder: Path):
    with pytest.raises(ConfigError, match=r"infer_dtype: float16 .* Use bfloat16, float32 or auto"):
        load_speaker(run_of(model_folder, infer_dtype="float16", use_cpu=True))


@pytest.mark.parametrize(
    ("keys", "max_length", "seed"),
    [
        ({}, None, None),
        ({"max_length": 9}, 9, None),
        ({"max_length": 9, "max_new_tokens": 8}, None, None),
        ({"seed": 42}, None, 42),
    ],
)
def test_sampling_takes_max_length_and_seed_only_where_they_are_meant(
    keys: dict[str, int], max_length: int | None, seed: int | None
):
    sampling = sampling_of(load({"model_name_or_path": "somewhere", **keys}))
    assert (sampling.max_length, sampling.seed) == (max_length, seed)
