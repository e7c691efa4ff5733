"""The label server: pages on which people rank outputs and write answers (`tunetrail label serve`).

database.py  tables, changes that the database itself refuses, SQLite and PostgreSQL
clock.py     the time of leases and sessions
events.py    the type of an event
store.py     the audit trail: tasks, and events chained by their digests
choosing.py  which task comes next
queue.py     assignments, leases, drafts, answers, undo
answers.py   which answers are valid
access.py    labelers, tokens, sessions, rate limits
requests.py  which requests are refused before a page sees them
web.py       the pages, from templates/ and static/
serve.py     the server process
"""
