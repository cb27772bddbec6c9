"""README and docs: the files, modules, links, anchors and messages that they name exist; page one stays one page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.toml")])
SOURCES = sorted(path for folder in ("ra_jax", "scripts", "tests") for path in ROOT.glob(f"{folder}/**/*.py"))
SHELL = sorted(path for path in ROOT.glob("scripts/**/*") if path.suffix in (".sh", ".env", ".sbatch"))
# "config" is what variables are called, too.
ROOMS = sorted({path.parent.name for path in ROOT.glob("ra_jax/*/__init__.py")} - {"config"})

FILE = re.compile(r"(?<![\w/.~])(?:scripts|configs|tests|docs|ra_jax)/(?:[\w./-]*\.\w+|[\w/-]*/(?=[`\s]))")
MODULE = re.compile(r"python3? -m (ra_jax[\w.]*\w)")
# `room/module.name`, `room.module.name`, `ra_jax.room.module`, with or without .py
NAME = re.compile(rf"`(?:ra_jax[./])?((?:{'|'.join(ROOMS)})[./][\w./]*\w)`")
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")


def text_of(path):
    """The text of a document; of the changelog without the first column of its tables, which has old names."""
    text = path.read_text(encoding="utf-8")
    return text if path.name != "CHANGELOG.md" else re.sub(r"(?m)^\|[^|]*\|", "|", text)


def exists(name):
    """Whether `room/module.name` names a file, a folder or something that a module of the package mentions."""
    if (ROOT / "ra_jax" / name).exists():
        return True
    parts = re.split(r"[./]", name)
    for count in range(len(parts), 0, -1):
        base = ROOT.joinpath("ra_jax", *parts[:count])
        module = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)
        if module:
            return count == len(parts) or re.search(rf"\b{parts[count]}\b", module.read_text(encoding="utf-8"))
    return False


@pytest.mark.parametrize("path", [*DOCUMENTS, *SOURCES, *SHELL], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_modules_that_are_named_exist(path):
    text = text_of(path)
    missing = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    for name in MODULE.findall(text):
        module = ROOT / name.replace(".", "/")
        if not (module.with_suffix(".py").exists() or (module / "__main__.py").exists()):
            missing.append(f"python -m {name}")
    missing += [name for name in NAME.findall(text) if not exists(name)]
    assert missing == []


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.suffix == ".md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target, anchor in LINK.findall(text):
        if target.startswith("http"):
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        headings = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8")) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor[1:] in anchors, anchor


def test_readme_is_one_page_with_one_image():
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 10_000
    assert len(re.findall(rb"!\[", text)) == 1


def test_the_design_lists_every_module():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    modules = {path.relative_to(ROOT / "ra_jax") for path in ROOT.glob("ra_jax/**/*.py") if path.name != "__init__.py"}
    assert [str(module) for module in sorted(modules) if f"`{module}`" not in text] == []


def messages():
    """The messages in the documents' tables of messages, in the words that a program may vary no more."""
    for path in DOCUMENTS:
        for table in re.findall(r"(?m)^\| message.*\n(?:\|.*\n)+", path.read_text(encoding="utf-8")):
            for row in table.splitlines()[2:]:
                for message in re.findall(r"`([^`]+)`", row.split("|")[1]):
                    yield max(re.split(r"…|\d+|<class 'list'>|Expected dict ", message), key=len).strip(" ,×")


@pytest.mark.parametrize("message", sorted(set(messages())))
def test_a_message_that_a_table_explains_is_in_the_code(message):
    # A text may go on in the next line of the code, as another string.
    code = [re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in ROOT.glob("ra_jax/**/*.py")]
    assert any(message in text for text in code)
