"""Alembic's environment for the tables of this application."""

from notebook.models import Base

from todo_db.migrations import configure

configure(Base.metadata)
