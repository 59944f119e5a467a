"""Documents from every kind of source, and rows that lose nothing, add nothing and stay balanced."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from moequant.errors import CorpusError
from moequant.text import corpus
from moequant.text.corpus import MIXED, Document, Rows
from tests.models import SHARED


def byte_level_bpe() -> Tokenizer:
    """A byte-level BPE of 300 tokens with two chat tokens, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the rain in the plain falls mainly on the train"] * 4, trainer)
    return tokenizer


TOKENIZER = byte_level_bpe()
BOS = TOKENIZER.token_to_id("<|im_start|>")

texts = st.text(st.sampled_from("the rain\r\n\tλ雨🙂0"), min_size=1, max_size=200)
domains = st.sampled_from(("code", "news", "poems", MIXED))
corpora = st.lists(st.builds(Document, domains, texts), min_size=1, max_size=12)
lengths = st.integers(2, 40)
starts = st.sampled_from((None, BOS))


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return ids


def packed(documents: list[Document], length: int, **options: int | None) -> Rows:
    """`pack` of what is long enough; other draws are not the tests' business."""
    marks = len(documents) if options.get("bos_id") is not None else 0
    assume(sum(len(encode(document.text)) for document in documents) + marks >= 2 * length)
    return corpus.pack(documents, TOKENIZER, length, **options)


# Packing


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL"])
def test_json_lines_as_windows_writes_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes('\ufeff{"text": "one"}\r\n{"text": "two"}\r\n'.encode())
    assert [document.text for document in corpus.read(tmp_path / name)] == ["one", "two"]


@given(corpora, lengths)
def test_no_token_is_lost_or_invented_but_the_tail(documents: list[Document], length: int) -> None:
    rows = packed(documents, length)
    given_ids = Counter(i for document in documents for i in encode(document.text))
    taken = Counter(rows.ids.flatten().tolist())
    assert taken <= given_ids
    assert given_ids.total() - taken.total() < length
    assert rows.ids.dtype == torch.int64
    assert rows.ids.shape == (len(rows.domains), length)
    assert rows.tokens == rows.ids.numel()


@given(corpora, lengths)
def test_a_row_holds_one_domain_unless_it_says_mixed(documents: list[Document], length: int) -> None:
    rows = packed(documents, length)
    for domain in {document.domain for document in documents}:
        stock = Counter(
            i for document in documents if document.domain == domain for i in encode(document.text)
        )
        pure = [row for row, name in zip(rows.ids.tolist(), rows.domains, strict=True) if name == domain]
        if domain != MIXED:
            assert len(pure) == stock.total() // length
            assert Counter(i for row in pure for i in row) <= stock


@given(corpora, lengths, starts)
def test_any_prefix_is_balanced(documents: list[Document], length: int, bos_id: int | None) -> None:
    rows = packed(documents, length, bos_id=bos_id)
    total, so_far = Counter(rows.domains), Counter[str]()
    for domain in rows.domains:
        so_far[domain] += 1
        running = [so_far[d] for d in total if so_far[d] < total[d]]
        assert not running or max(so_far.values()) - min(running) <= 1


@given(corpora, lengths, st.integers(0, 9), starts, st.data())
def test_a_smaller_budget_is_a_prefix(
    documents: list[Document], length: int, seed: int, bos_id: int | None, data: st.DataObject
) -> None:
    everything = packed(documents, length, seed=seed, bos_id=bos_id)
    budget = data.draw(st.integers(2 * length, everything.tokens + length))
    some = packed(documents, length, tokens=budget, seed=seed, bos_id=bos_id)
    assert some.tokens == min(budget // length * length, everything.tokens)
    assert torch.equal(some.ids, everything.ids[: len(some.ids)])
    assert some.domains == everything.domains[: len(some.domains)]


@given(corpora, lengths, st.data())
def test_spread_rows_are_rows_and_a_smaller_budget_is_a_prefix(
    documents: list[Document], length: int, data: st.DataObject
) -> None:
    every = packed(documents, length)
    everything = corpus.spread(every, every.tokens)
    assert sorted(everything.ids.tolist()) == sorted(every.ids.tolist())
    pairs = [sorted(zip(rows.domains, rows.ids.tolist(), strict=True)) for rows in (every, everything)]
    assert pairs[0] == pairs[1]
    budget = data.draw(st.integers(corpus.MIN_ROWS * length, every.tokens))
    some = corpus.spread(every, budget)
    assert torch.equal(some.ids, everything.ids[: budget // length])
    assert some.tokens == some.ids.numel()


def test_spread_rows_lie_evenly() -> None:
    rows = Rows(torch.arange(1000).view(500, 2), ("a",) * 200 + ("b",) * 300, "x", 1000)
    for count in (2, 7, 40, 120):
        chosen = corpus.spread(rows, 2 * count)
        for domain, begin, size in ("a", 0, 200), ("b", 200, 300):
            own = [row for row, each in zip(chosen.ids, chosen.domains, strict=True) if each == domain]
            at = sorted(int(row[0]) // 2 - begin for row in own)
            assert len(at) in (count // 2, -(-count // 2))
            gaps = [y - x for x, y in zip([0, *at], [*at, size], strict=True)]
            assert max(gaps) <= 4 * size / len(at) + 1
    with pytest.raises(CorpusError, match=r"a budget of 3 tokens: .*; raise --calib-tokens$"):
        corpus.spread(rows, 3)


def test_the_seed_decides_the_order() -> None:
    documents = [Document(f"d{i % 3}", f"text number {i} " * 9) for i in range(30)]
    first, again, other = (corpus.pack(documents, TOKENIZER, 32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids, again.ids)
    assert first.domains == again.domains
    assert not torch.equal(first.ids, other.ids)


@given(
    st.text(st.sampled_from("the rain\r\n λ🙂"), min_size=60), st.integers(2, 12), starts, st.integers(0, 9)
)
def test_one_document_is_cut_as_llama_cpp_cuts_a_file(
    text: str, length: int, bos_id: int | None, seed: int
) -> None:
    """Its rule, after imatrix.cpp: BOS before the text, and over the first token of each chunk."""
    stream = encode(text) if bos_id is None else [bos_id, *encode(text)]
    chunks = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    for chunk in chunks:
        chunk[0] = chunk[0] if bos_id is None else bos_id
    assume(len(chunks) >= 2)
    rows = corpus.pack([Document("file", text)], TOKENIZER, length, seed=seed, bos_id=bos_id)
    assert rows.ids.tolist() == chunks


def test_special_tokens_in_the_text_are_special() -> None:
    rows = corpus.pack([Document("chat", "<|im_start|>user\nrain<|im_end|>\n")], TOKENIZER, 4)
    assert rows.ids[0, 0] == BOS
    assert TOKENIZER.token_to_id("<|im_end|>") in rows.ids


def test_a_tokenizer_that_truncates_and_pads_is_not_obeyed_and_not_changed() -> None:
    cutting = Tokenizer.from_str(TOKENIZER.to_str())
    cutting.enable_truncation(3)
    cutting.enable_padding(length=700)
    documents = [Document("a", "the rain in the plain " * 20), Document("b", "train " * 30)]
    assert torch.equal(corpus.pack(documents, cutting, 8).ids, corpus.pack(documents, TOKENIZER, 8).ids)
    assert cutting.truncation["max_length"] == 3
    assert cutting.padding["length"] == 700


def test_any_object_that_encodes_will_do() -> None:
    class Codepoints:
        def encode_ids(self, text: str) -> list[int]:
            return [ord(c) for c in text]

    assert corpus.pack([Document("a", "abcdefg")], Codepoints(), 3).ids.tolist() == [
        [97, 98, 99],
        [100, 101, 102],
    ]


def test_sources_are_named_once() -> None:
    documents = [Document("a", "rain " * 40, source) for source in ("x.txt", "y.txt", "x.txt")]
    assert corpus.pack(documents, TOKENIZER, 8).source == "x.txt, y.txt"


@pytest.mark.parametrize(
    ("length", "tokens", "message"),
    [
        (1, None, r"row length 1: a row needs at least 2 tokens"),
        (512, None, r"a\.txt: 20 tokens found, 1024 needed \(2 rows of 512\)"),
        (8, 15, r"a budget of 15 tokens: 16 are the least \(2 rows of 8\); raise --eval-tokens$"),
    ],
)
def test_rows_that_cannot_be(length: int, tokens: int | None, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        corpus.pack([Document("a", "0" * 20, "a.txt")], TOKENIZER, length, tokens)


def test_no_documents_at_all() -> None:
    with pytest.raises(CorpusError, match="no documents: 0 tokens found"):
        corpus.pack([], TOKENIZER, 8)


def test_check_holds_rows_against_the_model() -> None:
    rows = corpus.pack([Document("a", "the rain " * 40, "a.txt")], TOKENIZER, 16)
    top = int(rows.ids.max())
    assert corpus.check(rows, max_length=16, vocab_size=top + 1) is rows
    assert corpus.check(rows) is rows
    with pytest.raises(CorpusError, match="rows of 16 tokens: the model's context is 15"):
        corpus.check(rows, max_length=15)
    with pytest.raises(
        CorpusError, match=rf"a\.txt: token id {top}, but .* tokenizer disagrees with the embedding"
    ):
        corpus.check(rows, vocab_size=top)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared models and text beside the checkout")
def test_a_real_file_of_a_megabyte() -> None:
    tokenizer = Tokenizer.from_file(str(SHARED / "models/mix/tokenizer.json"))
    rows = corpus.pack(corpus.read(SHARED / "data/calib.txt"), tokenizer, tokens=400 * 512)
    text = (SHARED / "data/calib.txt").read_bytes().decode()
    assert "\r\n" in text
    assert rows.ids.flatten().tolist() == tokenizer.encode(text, add_special_tokens=False).ids[: 400 * 512]


# Reading


def test_line_ends_survive(tmp_path: Path) -> None:
    text = "one\r\ntwo\rthree\n\r\n\ufefffour\u2028five"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": text}, ensure_ascii=False) + "\n", "utf-8", newline=""
    )
    assert [d.text for d in corpus.read(tmp_path / "a.txt")] == [text]
    assert [d.text for d in corpus.read(tmp_path)] == [text, text]
    assert [d.text for d in corpus.read(tmp_path / "b.jsonl")] == [text]


def test_a_folder_names_the_domains(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for name, text in {
        "code/deep/b.py": "b",
        "code/a.py": "a",
        "news/a.txt": "n",
        "top.md": "t",
        "empty.txt": " \n",
        ".hidden": "no",
        ".git/config": "no",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    found = [(document.domain, document.text) for document in corpus.read(str(folder))]
    assert found == [("code", "a"), ("code", "b"), ("news", "n"), ("texts", "t")]
    assert {document.source for document in corpus.read(folder)} == {folder.name}


def test_json_lines(tmp_path: Path) -> None:
    lines = [
        '{"text": "a\\r\\n", "domain": "x", "id": 3}',
        "",
        '{"domain": null, "text": "b"}',
        '{"text": ""}',
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(lines) + "\n")
    found = corpus.read(tmp_path / "set.jsonl")
    assert [(document.domain, document.text) for document in found] == [("x", "a\r\n"), ("set", "b")]


def test_conversations_go_through_the_template_that_is_given(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant"}]}))
    found = corpus.read(file, render=lambda messages: "|".join(m["role"] for m in messages))
    assert [document.text for document in found] == ["user|assistant"]
    with pytest.raises(CorpusError, match=r'chat\.jsonl:1: "messages" needs a chat template'):
        corpus.read(file)
    with pytest.raises(CorpusError, match=r"chat\.jsonl:1: the chat template refuses .*'content'"):
        corpus.read(file, render=lambda messages: "".join(m["content"] for m in messages))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"none\.txt: no such file or folder$"),
        ("sub/none", None, r"sub/none: no such file or folder$"),
        ("empty.txt", b"", r"empty\.txt: empty; expected text"),
        ("blank.txt", b" \r\n\t\n", r"blank\.txt: empty; expected text"),
        ("junk.txt", b"text \xff\xfe\x00", r"junk\.txt: not UTF-8 text \(byte 0xff at offset 5\)"),
        ("cut.txt", "ab雨".encode()[:-1], r"cut\.txt: not UTF-8 text \(byte 0xe9 at offset 2\)"),
        ("zeros.bin", b"abc\0\0", r"zeros\.bin: binary, not text \(NUL at offset 3\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'\n{"content": "a", "b": 1}', r'a\.jsonl:2: no string "text" \(fields: b, content\)'),
        ("a.jsonl", b'{"text": 5}', r'a\.jsonl:1: no string "text" \(fields: text\)'),
        ("a.jsonl", b'["a"]', r"a\.jsonl:1: a JSON list; expected an object"),
        ("a.jsonl", b'{"text": "a", "domain": 7}', r'a\.jsonl:1: "domain" is 7; expected a string'),
        ("a.jsonl", b'{"text": "ab\\ud800c"}', r"a\.jsonl:1: lone surrogate at character 2"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1: not JSON"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: empty; expected text"),
        ("a.jsonl", b"\x80", r"a\.jsonl: not UTF-8 text"),
    ],
)
def test_unusable_text_gets_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        corpus.read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_junk_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(CorpusError, match=r"b\.png: not UTF-8 text"):
        corpus.read(tmp_path)


def test_folders_and_names_with_nothing_in_them(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="empty; expected text"):
        corpus.read(tmp_path)
    with pytest.raises(CorpusError, match="an empty name"):
        corpus.read("")
    with pytest.raises(CorpusError, match="File name too long"):
        corpus.read("x" * 5000)


@pytest.mark.skipif(not Path("/dev/null").is_char_device(), reason="no /dev/null on this system")
def test_a_device_is_not_text() -> None:
    with pytest.raises(CorpusError, match="/dev/null: neither a file nor a folder"):
        corpus.read("/dev/null")


def test_the_bundled_set_feeds_both_splits() -> None:
    calibration, evaluation = corpus.read(), corpus.read(split="evaluation")
    assert {document.domain for document in calibration} >= {"arithmetic", "csv", "json", "logs", "python"}
    assert {document.source for document in evaluation} == {"bundled evaluation set"}
    rows = corpus.pack(calibration, TOKENIZER, 512, tokens=60 * 512)
    assert len(set(rows.domains[:12])) == 12


# Hugging Face datasets


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_a_dataset_needs_its_library() -> None:
    with pytest.raises(CorpusError, match=r"no-one/nothing: no such file .* pip install datasets$"):
        corpus.read("no-one/nothing")


class TestDatasets:
    """The real library on a local dataset, through the same calls that would fetch one."""

    @pytest.fixture(autouse=True)
    def local(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("datasets", reason="datasets is not installed")
        (tmp_path / "tales").mkdir()
        rows = [{"text": "one\r\n", "domain": "x"}, {"text": "two", "domain": None}]
        (tmp_path / "tales/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "tales/test.jsonl").write_text('{"text": "held out"}\n')
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize(
        ("name", "split", "expected"),
        [
            ("tales:", "calibration", [("x", "one\r\n"), ("tales", "two")]),
            ("tales:", "evaluation", [("tales", "held out")]),
            ("tales:default:test", "calibration", [("tales", "held out")]),
            ("tales::test", "calibration", [("tales", "held out")]),
        ],
    )
    def test_rows_become_documents(
        self, name: str, split: corpus.Split, expected: list[tuple[str, str]]
    ) -> None:
        found = corpus.read(name, split)
        assert [(document.domain, document.text) for document in found] == expected

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("tales::dev", "no split dev; it has train, test"),
            ("tales:odd", "not a usable dataset .*'odd' not found"),
        ],
    )
    def test_a_split_or_configuration_that_is_not_there(self, name: str, message: str) -> None:
        with pytest.raises(CorpusError, match=message):
            corpus.read(name)
