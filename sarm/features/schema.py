"""The tables of a feature database, version 1; docs/features.md describes every column."""

VERSION = 1

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS feature (
    id INTEGER PRIMARY KEY,
    rows INTEGER NOT NULL,
    frequency REAL NOT NULL,
    mean REAL NOT NULL,
    max REAL NOT NULL,
    weight REAL NOT NULL,
    contribution REAL NOT NULL,
    chosen REAL,
    rejected REAL,
    contrast REAL,
    length_corr REAL,
    markdown_corr REAL,
    histogram TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS context (
    id INTEGER PRIMARY KEY,
    feature INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('top', 'sample')),
    activation REAL NOT NULL,
    position INTEGER NOT NULL,
    tokens TEXT NOT NULL,
    activations TEXT NOT NULL,
    source TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS context_feature ON context (feature, kind, activation DESC);
CREATE TABLE IF NOT EXISTS label (
    feature INTEGER NOT NULL,
    method TEXT NOT NULL,
    label TEXT NOT NULL,
    explanation TEXT,
    score REAL,
    detection REAL,
    details TEXT NOT NULL DEFAULT '{}',
    PRIMARY KEY (feature, method)
);
CREATE TABLE IF NOT EXISTS background (
    rank REAL PRIMARY KEY,
    source TEXT NOT NULL,
    position INTEGER NOT NULL,
    tokens TEXT NOT NULL,
    active TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS progress (name TEXT PRIMARY KEY, value BLOB NOT NULL);
"""

# The words of contexts and labels; absent where SQLite was built without FTS5, and search then
# scans. A context's rowid is its id; a label's words are found by (feature, method).
FULL_TEXT = """
CREATE VIRTUAL TABLE IF NOT EXISTS context_words USING fts5(text, content='');
CREATE VIRTUAL TABLE IF NOT EXISTS label_words
    USING fts5(text, feature UNINDEXED, method UNINDEXED);
"""
