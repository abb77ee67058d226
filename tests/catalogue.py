"""Reads the lines of the doctor's catalogue from a live database."""

from driver import Connection

from todo_db.doctor.catalogue import SETTINGS, STATEMENT, Catalogue, catalogued


async def read(connection: Connection) -> Catalogue:
    async with connection.transaction():
        await connection.execute(SETTINGS)
        found = await connection.fetch(STATEMENT)
    return catalogued((row[0], row[1]) for row in found)
