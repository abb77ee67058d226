"""Reads the lines of the doctor's catalogue from a live database.

After a change of the migrations, `uv run python tests/helpers/catalogue.py` writes those of a fresh
one.
"""

import asyncio
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
from driver import Connection

from todo_db import doctor
from todo_db.doctor.catalogue import SETTINGS, STATEMENT, Catalogue, catalogued
from todo_db.embedded import EmbeddedPostgres
from todo_db.migrations import upgrade


async def read(connection: Connection, objects: Collection[str] | None = None) -> Catalogue:
    """Return the lines about some objects, or about all."""
    async with connection.transaction():
        await connection.execute(SETTINGS)
        found = await connection.fetch(STATEMENT, objects)
    return catalogued((row[0], row[1]) for row in found)


async def write(url: str) -> None:
    await upgrade(url)
    connection: Connection = await asyncpg.connect(url)
    lines = sorted(await read(connection))
    await connection.close()
    text = "".join(f"{line}\n" for line in lines)
    Path(doctor.__file__).with_name("catalogue.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder)) as server:
        asyncio.run(write(server.url()))
