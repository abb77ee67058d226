"""A todo application with labels, due dates, and a chat: tables of its own beside todo_db's."""
