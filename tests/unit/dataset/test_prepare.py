"""From a run to samples: sets, splits, caches, streams, saved data, workers, and what goes wrong."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from byte_tokenizer import make_byte_tokenizer
from data_folder import alpaca_rows, make_run, prepare_run, write_set
from fourfold.base.errors import ConfigError, DataError
from fourfold.dataset.batch import Sample
from fourfold.dataset.prepare import Prepared, load_rows
from fourfold.dataset.stage_rows import check_named
from fourfold.dataset.storage import TokenisedDataset
from fourfold.dataset.workers import num_workers
from fourfold.training.predict import split_last_answer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))


def train_of(prepared: Prepared) -> TokenisedDataset:
    assert prepared.train is not None
    return prepared.train


def text_of(sample: Sample, role: str = "") -> str:
    ids = sample.sequences[role].input_ids
    return str(make_byte_tokenizer("<|im_start|>", "<|im_end|>").decode(ids))


def test_prepare_when_alpaca_makes_samples_with_lengths_stats_and_order(tmp_path: Path) -> None:
    data = train_of(prepare_run(write_set(tmp_path, "a", alpaca_rows(3)), dataset="a"))
    assert len(data) == 3
    assert "question 1<|im_end|>\n<|im_start|>assistant\nanswer 1<|im_end|>\n" in text_of(data[1])
    assert data.lengths.tolist() == [len(data[number]) for number in range(3)]
    assert data.num_targets.tolist() == [data[number].sequences[""].num_targets for number in range(3)]
    stats = data.stats["a"]
    assert (stats.rows, stats.samples, stats.tokens) == (3, 3, int(data.lengths.sum()))
    assert [data[number].index for number in range(3)] == [0, 1, 2]
    with pytest.raises(IndexError):
        data[3]


def test_prepare_when_chunks_are_small_has_the_same_samples(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "a", alpaca_rows(7))
    whole = train_of(prepare_run(folder, dataset="a"))
    parts = train_of(prepare_run(folder, dataset="a", preprocessing_batch_size=2))
    assert whole.fingerprint != parts.fingerprint
    assert [whole[n] for n in range(7)] == [parts[n] for n in range(7)]
    assert pickle.loads(pickle.dumps(parts))[5] == whole[5]


@pytest.mark.parametrize("keys", [{}, {"streaming": True, "max_steps": 1}])
def test_prepare_when_texts_leave_answers_out_warns(
    keys: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_set(tmp_path, "a", [*alpaca_rows(5), {"instruction": "a text " * 9, "output": ""}])
    for stage, told in (("sft", ""), ("pt", "have answers that are left out, since stage pt trains on the prompt")):
        caplog.clear()
        prepared = prepare_run(folder, dataset="a", stage=stage, packing=False, **keys)
        if prepared.stream is not None:
            list(prepared.stream.epoch(0))
        warnings = [line.getMessage() for line in caplog.records if "left out" in line.getMessage()]
        assert len(warnings) == bool(told)
        assert all(told in line and line.startswith("dataset a: ") for line in warnings)
    assert keys or "5 rows have answers" in warnings[0]


def test_prepare_when_nothing_changed_loads_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder = write_set(tmp_path, "a", alpaca_rows(3))
    first = train_of(prepare_run(folder, dataset="a"))
    assert "Loading" not in caplog.text
    assert train_of(prepare_run(folder, dataset="a")).folder == first.folder
    assert "Loading tokenised data" in caplog.text
    for other in ({"cutoff_len": 30}, {"mask_history": True}, {"template": "default"}, {"max_samples": 2}):
        assert train_of(prepare_run(folder, dataset="a", **other)).fingerprint != first.fingerprint
    write_set(tmp_path, "a", alpaca_rows(3, answer="reply"))
    assert train_of(prepare_run(folder, dataset="a")).fingerprint != first.fingerprint


def test_prepare_when_sets_are_mixed_follows_the_strategy(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "a", alpaca_rows(3, answer="first"))
    write_set(tmp_path, "b", alpaca_rows(2, answer="second"))
    mixed = train_of(prepare_run(folder, dataset="a,b", mix_strategy="interleave_once"))
    assert ["first" in text_of(mixed[n]) for n in range(5)] == [True, False, True, False, True]
    assert mixed.sets.tolist() == [0, 1, 0, 1, 0]
    assert (mixed.stats["a"].samples, mixed.stats["b"].samples) == (3, 2)


def test_prepare_when_val_size_is_given_splits_without_overlap(tmp_path: Path) -> None:
    prepared = prepare_run(write_set(tmp_path, "a", alpaca_rows(10)), dataset="a", val_size=0.2)
    train, held_out = train_of(prepared), prepared.eval[""]
    assert (len(train), len(held_out)) == (8, 2)
    texts = {text_of(train[n]) for n in range(8)} | {text_of(held_out[n]) for n in range(2)}
    assert len(texts) == 10
    assert set(prepared.fingerprints) == {"train", "eval"}


def test_prepare_when_val_size_leaves_nothing_says_so(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "a", alpaca_rows(3))
    with pytest.raises(ConfigError, match="val_size: 3 of 3 rows leaves 0 to train on and 3 to evaluate on"):
        prepare_run(folder, dataset="a", val_size=3)


def test_prepare_when_eval_sets_are_named_evaluates_together_or_on_each(tmp_path: Path) -> None:
    folder = write_set(write_set(tmp_path, "a", alpaca_rows(3)), "b", alpaca_rows(2))
    together = prepare_run(folder, eval_dataset="a,b")
    assert together.train is None
    assert {name: len(data) for name, data in together.eval.items()} == {"": 5}
    each = prepare_run(folder, eval_dataset="a,b", eval_on_each_dataset=True)
    assert {name: len(data) for name, data in each.eval.items()} == {"a": 3, "b": 2}
    assert set(each.fingerprints) == {"eval_a", "eval_b"}


def test_prepare_when_packing_joins_samples_as_documents(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "a", alpaca_rows(5))
    single = train_of(prepare_run(folder, dataset="a"))
    longest = int(single.lengths.max())
    packed = train_of(prepare_run(folder, dataset="a", packing=True, cutoff_len=2 * longest + 1))
    assert [len(packed[n].sequences[""].documents) for n in range(len(packed))] == [2, 2, 1]
    assert sorted(packed.document_lengths().tolist()) == sorted(single.lengths.tolist())
    assert packed.num_targets.sum() == single.num_targets.sum()
    assert set(packed.sets.tolist()) == {-1}


@pytest.mark.parametrize("shape", [{"packing": True}, {"neat_packing": True}, {"train_on_prompt": True}])
def test_prepare_when_rows_are_answered_keeps_each_apart_with_its_prompt(
    tmp_path: Path, shape: dict[str, bool]
) -> None:
    folder = write_set(tmp_path, "a", alpaca_rows(12))
    asked: dict[str, Any] = {"dataset": "a", "val_size": 5, "predict_with_generate": True, "do_predict": True}
    plain, shaped = prepare_run(folder, **asked), prepare_run(folder, **asked, **shape)
    rows = [shaped.eval[""][n] for n in range(5)]
    assert rows == [plain.eval[""][n] for n in range(5)]
    assert all(split_last_answer(row)[0] for row in rows)
    train = train_of(shaped)
    assert (len(train) < 7) == ("train_on_prompt" not in shape)  # packed as before
    assert train.num_targets.sum() > train_of(plain).num_targets.sum() or "train_on_prompt" not in shape


@pytest.mark.parametrize("key", ["packing", "train_on_prompt"])
def test_prepare_when_saved_rows_cannot_be_answered_refuses_them(tmp_path: Path, key: str) -> None:
    folder = write_set(tmp_path, "a", alpaca_rows(12))
    saved: dict[str, Any] = {"dataset": "a", "val_size": 5, "tokenized_path": str(tmp_path / "saved"), key: True}
    asked = {"predict_with_generate": True, "do_predict": True}
    prepare_run(folder, **saved)
    with pytest.raises(DataError, match=rf"eval was made with {key}: true, so its rows cannot be answered"):
        prepare_run(folder, **saved, **asked)
    prepared = prepare_run(folder, **saved, **asked, overwrite_cache=True)
    assert len(prepared.eval[""]) == 5
    assert len(prepare_run(folder, **saved, **asked).eval[""]) == 5


def test_prepare_when_stage_is_pt_packs_by_default(tmp_path: Path) -> None:
    rows = [{"text": "word " * 10} for _ in range(10)]
    folder = write_set(tmp_path, "a", rows, columns={"prompt": "text"})
    packed = train_of(prepare_run(folder, dataset="a", stage="pt", cutoff_len=100))
    assert packed.lengths.tolist() == [100] * 5
    with pytest.raises(DataError, match="cutoff_len: the 10 rows hold 510 tokens, too few for one block of 1000"):
        prepare_run(folder, dataset="a", stage="pt", cutoff_len=1000)
    assert len(train_of(prepare_run(folder, dataset="a", stage="pt", packing=False))) == 10


def test_prepare_when_stage_is_kto_reads_tags_and_pairs(tmp_path: Path) -> None:
    rows = [{**row, "tag": n % 2 == 0} for n, row in enumerate(alpaca_rows(3))]
    columns = {"prompt": "instruction", "response": "output", "kto_tag": "tag"}
    data = train_of(prepare_run(write_set(tmp_path, "a", rows, columns=columns), dataset="a", stage="kto"))
    assert [data[n].extras["desirable"] for n in range(3)] == [1.0, 0.0, 1.0]
    assert text_of(data[1], "kl").endswith("answer 0<|im_end|>\n")


def test_prepare_when_stage_is_ppo_gives_prompts_and_references(tmp_path: Path) -> None:
    data = train_of(prepare_run(write_set(tmp_path, "a", alpaca_rows(2)), dataset="a", stage="ppo"))
    assert text_of(data[0], "prompt").endswith("<|im_start|>assistant\n")
    assert text_of(data[0], "reference") == "answer 0<|im_end|>\n"


@pytest.mark.parametrize(
    ("stage", "entry", "message"),
    [
        ("dpo", {}, "has no preference pairs, which dpo needs. Its entry must say `ranking: true`"),
        ("sft", {"ranking": True}, "holds preference pairs, which sft does not train on. Use stage dpo or rm"),
        ("kto", {}, "has no tags, which kto needs"),
        ("sft", {"columns": {"prompt": "instruction", "kto_tag": "t"}}, "Use stage kto"),
        ("sft", {"formatting": "text"}, "holds plain text, which sft does not train on. Use stage pt"),
    ],
)
def test_prepare_when_the_stage_needs_other_rows_says_which(
    tmp_path: Path, stage: str, entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_run(write_set(tmp_path, "a", alpaca_rows(2), **entry), dataset="a", stage=stage)
    assert message in str(caught.value)


def test_check_named_when_several_sets_cannot_be_used_tells_all_without_torch(tmp_path: Path) -> None:
    folder = write_set(write_set(tmp_path, "a", alpaca_rows(2)), "p", alpaca_rows(2), ranking=True)
    with pytest.raises(ConfigError) as caught:
        check_named(make_run(folder, dataset="a,p,b", eval_dataset="c"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["stage", "dataset", "eval_dataset"]
    (folder / "a.json").unlink()
    with pytest.raises(DataError, match=r"a.json: there is no such file"):
        check_named(make_run(folder, dataset="a"))
    code = "import sys, fourfold.dataset.stage_rows; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_prepare_when_a_row_lacks_a_field_names_file_and_row(tmp_path: Path) -> None:
    rows = alpaca_rows(5)
    del rows[3]["output"]
    folder = write_set(tmp_path, "a", rows, file="part/a.jsonl")
    with pytest.raises(DataError, match=r"part/a.jsonl, row 4: 'output' is missing .*skip_bad_rows: true") as caught:
        prepare_run(folder, dataset="a")
    assert (caught.value.file, caught.value.row) == (str(folder / "part/a.jsonl"), 3)


def test_prepare_when_bad_rows_are_skipped_counts_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[Any] = [*alpaca_rows(3), "no object", {"instruction": "a"}]
    data = train_of(prepare_run(write_set(tmp_path, "a", rows), dataset="a", skip_bad_rows=True))
    assert data.stats["a"].dropped == {"bad row": 2}
    assert "dataset a: 2 rows dropped (bad row)" in caplog.text
    assert "a.json, row 4: must be an object, not 'no object'" in caplog.text


def test_prepare_when_a_call_is_no_json_names_the_row(tmp_path: Path) -> None:
    good = [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]
    bad = [{"from": "human", "value": "1"}, {"from": "function_call", "value": "call f"}]
    rows = [{"conversations": good}, {"conversations": bad}, {"conversations": good}]
    folder = write_set(tmp_path, "a", rows, formatting="sharegpt")
    with pytest.raises(DataError, match=r"a.json, row 2: messages: the function turn 'call f' is not the JSON"):
        prepare_run(folder, dataset="a")
    data = train_of(prepare_run(folder, dataset="a", skip_bad_rows=True))
    assert (len(data), data.stats["a"].dropped) == (2, {"bad row": 1})


def test_prepare_when_turns_are_broken_drops_and_counts_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]
    folder = write_set(tmp_path, "a", [{"conversations": good}, {"conversations": good[::-1]}], formatting="sharegpt")
    data = train_of(prepare_run(folder, dataset="a"))
    assert data.stats["a"].dropped == {"broken turns": 1}
    assert "a.json, row 2: turn 1 is of role assistant" in caplog.text


def test_prepare_when_nothing_is_left_to_train_drops_and_counts_or_refuses(tmp_path: Path) -> None:
    rows = [*alpaca_rows(2), {"instruction": "q" * 4000, "output": "a"}]
    folder = write_set(tmp_path, "a", rows)
    with pytest.raises(DataError, match=r"none of the 3 rows of a can be trained: 3 have nothing to train"):
        prepare_run(folder, dataset="a", cutoff_len=1)
    assert not any((tmp_path / "cache" / "tokenised").glob("*/"))


def test_prepare_when_saved_loads_it_and_refuses_another_tokenizer_or_template(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_set(tmp_path, "a", alpaca_rows(10))
    keys = {"tokenized_path": str(tmp_path / "saved"), "dataset": "a", "val_size": 3}
    made = prepare_run(folder, **keys)
    (folder / "a.json").unlink()
    loaded = prepare_run(folder, **keys)
    assert made.fingerprints == loaded.fingerprints
    assert (len(train_of(loaded)), len(loaded.eval[""])) == (7, 3)
    prepare_run(folder, **{**keys, "cutoff_len": 100})
    assert "made with cutoff_len 2048; 100 of this run has no effect" in caplog.text
    with pytest.raises(DataError, match="the data was made with another template"):
        prepare_run(folder, **{**keys, "template": "default"})
    with pytest.raises(DataError, match="is of kind 'chat', the stage needs 'prompt'"):
        prepare_run(folder, **{**keys, "stage": "ppo"})


def test_prepare_when_saved_path_holds_something_else_refuses_it(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "a", alpaca_rows(3))
    other = tmp_path / "other"
    other.mkdir()
    (other / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match="holds data that the `datasets` library saved"):
        prepare_run(folder, dataset="a", tokenized_path=str(other))
    assert [path.name for path in other.iterdir()] == ["dataset_dict.json"]


def stream_texts(prepared: Prepared, epoch: int = 0) -> list[str]:
    assert prepared.stream is not None
    return [text_of(sample) for sample in prepared.stream.epoch(epoch)]


def test_prepare_when_streaming_gives_the_samples_of_the_files(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "a", alpaca_rows(9), file="a.jsonl")
    whole = train_of(prepare_run(folder, dataset="a"))
    expected = [text_of(whole[n]) for n in range(9)]
    keys = {"dataset": "a", "streaming": True, "max_steps": 5, "preprocessing_batch_size": 2}
    ordered = prepare_run(folder, **keys, disable_shuffling=True)
    assert ordered.train is None
    assert stream_texts(ordered) == expected
    mixed = prepare_run(folder, **keys, buffer_size=4)
    assert stream_texts(mixed) != expected
    assert sorted(stream_texts(mixed)) == sorted(expected)
    assert stream_texts(mixed) == stream_texts(mixed)
    assert stream_texts(mixed, epoch=1) != stream_texts(mixed)


def test_prepare_when_streaming_holds_rows_out_and_mixes(tmp_path: Path) -> None:
    folder = write_set(write_set(tmp_path, "a", alpaca_rows(4)), "b", alpaca_rows(2, answer="other"))
    keys = {"streaming": True, "max_steps": 5, "disable_shuffling": True}
    prepared = prepare_run(folder, dataset="a", val_size=1, **keys)
    assert len(prepared.eval[""]) == 1
    assert len(stream_texts(prepared)) == 3
    texts = stream_texts(prepare_run(folder, dataset="a,b", mix_strategy="interleave_once", **keys))
    assert ["other" in text for text in texts] == [False, True, False, True, False, False]
    texts = stream_texts(prepare_run(folder, dataset="a,b", mix_strategy="interleave_over", **keys))
    assert ["other" in text for text in texts] == [False, True] * 4


def test_prepare_when_streamed_files_are_bad_says_so(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "a", [{"instruction": "a"}], file="a.jsonl")
    keys = {"streaming": True, "max_steps": 5}
    with pytest.raises(DataError, match=r"a.jsonl, row 1: 'output' is missing"):
        stream_texts(prepare_run(folder, dataset="a", **keys))
    with pytest.raises(DataError, match="no row of the stream can be trained"):
        stream_texts(prepare_run(folder, dataset="a", skip_bad_rows=True, **keys))
    with pytest.raises(ConfigError, match=r"val_size: 0\.5 is a share"):
        prepare_run(folder, dataset="a", val_size=0.5, **keys)


def test_load_rows_when_named_gives_parsed_rows(tmp_path: Path) -> None:
    run = make_run(write_set(tmp_path, "a", alpaca_rows(3)), dataset="a", max_samples=2)
    assert [row.messages[0].text for row in load_rows(run, run.data.dataset, "sft")] == ["question 0", "question 1"]


def test_num_workers_when_rows_are_few_is_one() -> None:
    assert num_workers(500, 16) == 1
    assert num_workers(10**9, 1) == 1
