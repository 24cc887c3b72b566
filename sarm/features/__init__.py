"""What every feature does: collected over real responses, kept in one SQLite file."""

from sarm.features.store import Context, Feature, FeatureStore, Hit, Label

__all__ = ["Context", "Feature", "FeatureStore", "Hit", "Label"]
