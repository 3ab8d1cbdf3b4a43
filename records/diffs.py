"""What changed in the scripts from one record to the next, as a unified diff.

This is a module of records.py, not a command: records.py new writes changes.diff with it.
"""
import ast
import difflib

from runs import MAX_JSON, Record, read_text, source_files, unix_lines


def script_diff(previous: Record, record: Record) -> tuple[str, str]:
    """(what the reader of the diff must know, the diff) of all files that the main arms of two records ran.

    A script that took in its harness.py is compared part by part with both of its old files, since a plain diff would
    show every line that moved as a change.
    """
    old_paths, new_paths = ({path.name: path for path in source_files(each.script(each.main))}
                            for each in (previous, record))
    old_script, new_script = previous.script(previous.main).name, record.script(record.main).name
    old, new = ({name: unix_lines(read_text(path, MAX_JSON)) for name, path in paths.items()}
                for paths in (old_paths, new_paths))
    about, from_names = "", {old_script: old_script}
    if "harness.py" in old and "harness.py" not in new:
        harness = old.pop("harness.py")
        old[old_script] = in_order_of(new[new_script], [old[old_script], harness])
        from_names[old_script] = f"{old_script} + harness.py"
        about = (f"{old_script} and harness.py of that record are one file here. The diff compares each function and "
                 "class with the one of the same name, in the order of the new file, so what only moved is not shown.")
    pairs = {new_script: old_script} | {name: name for name in [*new, *old] if name not in (new_script, old_script)}
    diff = ""
    for new_name, old_name in pairs.items():
        if old.get(old_name) != new.get(new_name):
            old_title = f"{previous.folder.name}/{from_names.get(old_name, old_name)}"
            diff += unified(old.get(old_name, ""), new.get(new_name, ""), old_title, f"{record.folder.name}/{new_name}")
    return about, f"# {about}\n{diff}" if about and diff else diff


def unified(old: str, new: str, *titles: str) -> str:
    """Unified diff of two texts; the last line of each ends in a line end."""
    lines = [(text + "\n" * (not text.endswith("\n"))).splitlines(keepends=True) if text else [] for text in (old, new)]
    return "".join(difflib.unified_diff(*lines, *titles))


def parts_of(text: str) -> dict[str, str]:
    """A module's top-level statements with the comments before them, by the names that they define."""
    lines, parts, begin = text.splitlines(keepends=True), {}, 0
    for number, node in enumerate(ast.parse(text).body):
        name = getattr(node, "name", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            name = " ".join(ast.unparse(target) for target in targets)
        name = name or ast.unparse(node)
        end = node.end_lineno
        if name in parts:
            name = f"{name} {number}"
        parts[name] = "".join(lines[begin:end])
        begin = end
    parts["the end"] = "".join(lines[begin:])
    return parts


def in_order_of(new: str, olds: list[str]) -> str:
    """The parts of the old texts in the order in which `new` has them, and then what it no longer has."""
    try:
        order, parts = list(parts_of(new)), {}
        for text in olds:
            for name, part in parts_of(text).items():
                while name in parts:
                    name += " again"
                parts[name] = part
    except (SyntaxError, ValueError, RecursionError):
        return "".join(olds)
    kept = [parts.pop(name) for name in order if name in parts]
    return "".join(kept + list(parts.values()))


if __name__ == "__main__":
    print(__doc__.strip())
