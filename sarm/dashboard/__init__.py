"""The page: rewards and their features in a browser, steered as one watches."""
