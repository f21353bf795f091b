"""The figures of size are those of the files."""

import textwrap

from benchmarks import lines

SOURCE = textwrap.dedent('''
    def told(of: dict[str, int], *rest: str) -> None:
        """Two lines."""

    class Room:
        async def untold(self, of: dict[str, Any], /, **more: list[dict[str, Any]]) -> dict[str, Any] | None:
            def inner():
                pass
''')


def test_what_a_small_repository_has(tmp_path):
    for name, text in {
        "bivlm/__init__.py": "1\n2\n",
        "bivlm/packing/a.py": "1\n",
        "bivlm/packing/deep/b.py": "1\n2\n3",
        "tasks/c.py": SOURCE,
        "tests/packing/test_a.py": "1\n",
        "tests/test_b.py": "1\n2\n",
        "docs/page.md": "# Two words\n",
        "README.md": "one two\nthree",
        "other/d.py": "nothing of ours\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert lines.product_lines(tmp_path) == {"bivlm": 2, "bivlm/packing": 4, "tasks": 8}
    assert lines.test_lines(tmp_path) == {"packing": 1, "": 2}
    assert lines.words_by_page(tmp_path) == {"README.md": 3, "docs/page.md": 3}
    functions = {place: (lines.length(node), lines.untold(node)) for place, node in lines.functions(tmp_path)}
    assert functions == {"tasks/c.py:2 told": (2, 0), "tasks/c.py:6 untold": (3, 3), "tasks/c.py:7 inner": (2, 0)}
