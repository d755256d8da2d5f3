"""Images to training batches: sources, sampling order, multi-crop views, masks, collation, photometric distortions."""
