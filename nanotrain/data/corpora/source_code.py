"""Source code: Django's Python files, and CodeI/O's programs with the task that each solves."""

import gzip
import json
from collections.abc import Iterator

from nanotrain.data.documents import Document
from nanotrain.data.wheels import WheelReader

CODEIO_MEMBER = "reasoning_gym/data/codeio.jsonl.gz"
_SHORTEST_FILE = 400


def django_files(reader: WheelReader) -> Iterator[Document]:
    """Yield one document a Python file; the family is the package two levels below `django`."""
    for member in reader.members("django/", ".py"):
        if "/locale/" in member:
            continue
        text = reader.read_text(member)
        if len(text) >= _SHORTEST_FILE:
            package = "/".join(member.removesuffix(".py").split("/")[:3])
            yield Document(f"# {member}\n{text}", f"django:{package}", "django")


def codeio_programs(reader: WheelReader) -> Iterator[Document]:
    """Yield a task, what goes in and out, and the program that solves it; the family is the task."""
    lines = gzip.decompress(reader.read_bytes(CODEIO_MEMBER)).decode("utf-8").splitlines()
    for line in lines:
        row = json.loads(line)
        task = row["task_description"].strip()
        header = "\n".join(f"# {part}" for part in f"{task}\n{row['input_output_spec'].strip()}".splitlines())
        yield Document(f"{header}\n{row['code_sample'].strip()}\n", f"codeio:{task}", "codeio")
