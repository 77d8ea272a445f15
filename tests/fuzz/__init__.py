"""Whatever arrives from outside is decoded, or refused with an error of ours: fuzz targets."""
