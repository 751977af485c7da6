"""Tables, figures and cards as one HTML file that needs no other file and no network. The only importer of jinja2."""

import base64
import pathlib
from dataclasses import dataclass
from typing import Any

import jinja2

from cxa_jax.data.views import describe_views
from cxa_jax.figures import PHANTOM_MARK
from cxa_jax.report_cards import Card
from cxa_jax.report_tables import Table

TEMPLATES = pathlib.Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ShownPicture:
    """A picture as the page embeds it: PNG bytes in base64, its width on screen, the files it also lies in."""

    name: str
    title: str
    caption: str
    data: str
    width: int
    files: str


@dataclass(frozen=True)
class Section:
    """A heading, what its numbers rest on, and what stands below it, in order."""

    title: str
    items: list[Table | ShownPicture]
    basis: str = ""


def embed_picture(path: pathlib.Path, name: str, title: str, caption: str, width: int) -> ShownPicture:
    """Read a PNG for the page; `width` in CSS px. Its PDF twin is named if it is there."""
    files = ", ".join(f"{path.parent.name}/{name}{end}" for end in (".png", ".pdf") if path.with_suffix(end).exists())
    return ShownPicture(name, title, caption, base64.b64encode(path.read_bytes()).decode(), width, files)


def render_page(report: dict[str, Any], cards: list[Card], sections: list[Section]) -> str:
    """Return the page; every text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    data = report["data"]
    kind = "drawings of chest phantoms" if report["phantom"] else "chest X-rays"
    views = {describe_views(run["config"].get("data.views", "")) for run in report["runs"] if run["kind"] == "run"}
    kind += "".join(f", {view}" for view in sorted(views - {""}))
    left_out = ", ".join(f"{name} {number:,}" for name, number in data["left_out"].items())
    return environment.get_template("report.html.j2").render(
        title="Cardiomegaly: " + ", ".join(group["name"] for group in report["groups"]),
        subtitle=f"Test: {data['num_images']:,} {kind}, {data['num_positives']:,} positive ({data['prevalence']:.1%}), "
        f"{data['num_patients']:,} patients. {report['protocol']['intervals']}",
        left_out=left_out and f"Only images on which all were tested are counted. Left out: {left_out}.",
        phantom=report["phantom"],
        phantom_mark=PHANTOM_MARK,
        cards=cards,
        sections=[section for section in sections if section.items],
        footer=f"Written {report['environment']['time']} by {report['environment']['command']}, "
        f"commit {report['environment']['commit'][:12]}. All numbers: report.json.",
    )
