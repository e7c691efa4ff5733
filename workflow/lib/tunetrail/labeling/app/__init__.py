"""The page on which people rank outputs and write answers: `tunetrail label serve`.

database.py  tables, what the database itself refuses, SQLite and PostgreSQL
store.py     the audit trail: tasks, and events chained by their digests
queue.py     who gets which task, drafts, answers, undo
answers.py   what an answer may be
access.py    labelers, tokens, sessions, rates
web.py       the pages; templates/ and static/
"""
