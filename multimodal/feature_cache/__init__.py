"""Features of a frozen encoder on disk: written once, read in every epoch and by every run that needs the same.

    cache = write_features(tower, pictures, Path("features/train"), needed_contents(adapter, all_contents(tower)))
    FeatureCache.open("features/train")[7]          # float16 [N + L, Dv]
"""
