"""Tables that nobody should send, drawn by hypothesis: a sound one, and what editors, mail and typing make of it."""

import csv
import io

from hypothesis import strategies as st

CELLS = ("", " ", "0", "1", "-1", "nan", "inf", "1e999", "0x10", "1_000", "١", "1,5", "true", "../../x", "/etc/passwd",
         "a" * 300, "a\0b", "\ud800", "é", "=1+1", '"', "'", "\n", "No Finding", "Cardiomegaly|", "|", "9" * 30,
         "1 2 3 4", "1 2 3 4;", "0.5")  # fmt: skip


@st.composite
def tables(draw: st.DrawFn, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> bytes:
    """Return the bytes of a CSV: `header` and `rows` after up to three changes, in some dialect and encoding."""
    header, rows = list(header), [list(row) for row in rows]
    for _ in range(draw(st.integers(0, 3))):
        row = rows[draw(st.integers(0, len(rows) - 1))] if rows else header
        place = draw(st.integers(0, max(0, len(header) - 1)))
        match draw(
            st.sampled_from(
                ("cell",) * 4 + ("text", "rename", "less", "more", "swap", "double", "short", "long", "none")
            )
        ):
            case "cell" if row:
                row[place % len(row)] = draw(st.sampled_from(CELLS))
            case "text" if row:
                row[place % len(row)] = draw(st.text(max_size=12))
            case "rename" if header:
                header[place] = draw(st.sampled_from((header[place].upper(), f" {header[place]} ", "other", "", "id")))
            case "less" if header:
                del header[place]
                for other in rows:
                    del other[place : place + 1]
            case "more":
                header.append("extra")
                for other in rows:
                    other.append("x")
            case "swap" if header:
                for line in (header, *rows):
                    if len(line) > place:
                        line[0], line[place] = line[place], line[0]
            case "double" if rows:
                rows.append(list(row))
            case "short" if row:
                row.pop()
            case "long":
                row.append("surplus")
            case "none":
                rows = []
    text = io.StringIO(newline="")
    delimiter = draw(st.sampled_from((",",) * 8 + (";", "\t")))
    writer = csv.writer(text, lineterminator=draw(st.sampled_from(("\n", "\r\n", "\n\n", "\r"))), delimiter=delimiter)
    for line in (header, *rows):
        try:
            writer.writerow(line)
        except csv.Error:
            writer.writerow([cell.replace("\0", "") for cell in line])
    encoding = draw(st.sampled_from(("utf-8",) * 8 + ("utf-8-sig",) * 3 + ("utf-16", "latin-1")))
    data = text.getvalue().encode(encoding, "replace")
    match draw(st.sampled_from(("whole",) * 8 + ("cut", "open quote", "binary", "twice"))):
        case "cut":
            return data[: draw(st.integers(0, len(data)))]
        case "open quote":
            return data + b'"' + b"x" * draw(st.sampled_from((3, 200_000)))
        case "binary":
            return data + draw(st.binary(max_size=20))
        case "twice":
            return data + data
        case _:
            return data
