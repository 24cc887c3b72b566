"""The tables of a feature database, version 2; docs/features.md describes every column."""

VERSION = 2

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
    span INTEGER NOT NULL,
    activations BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS span (
    id INTEGER PRIMARY KEY,
    source TEXT NOT NULL,
    position INTEGER NOT NULL,
    tokens TEXT NOT NULL
);
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

# Made when a collection ends: kept up to date meanwhile they would take a third of the writing.
INDICES = """
CREATE INDEX IF NOT EXISTS context_feature ON context (feature, kind, activation DESC);
CREATE INDEX IF NOT EXISTS context_span ON context (span, kind, feature, activation);
"""

# The words of contexts and labels; absent where SQLite was built without FTS5, and search then
# scans. A rowid is a span's id; a label's words are found by (feature, method).
FULL_TEXT = """
CREATE VIRTUAL TABLE IF NOT EXISTS span_words USING fts5(text, content='');
CREATE VIRTUAL TABLE IF NOT EXISTS label_words
    USING fts5(text, feature UNINDEXED, method UNINDEXED);
"""
