"""Generated scenes and data sets that users and tests share; only what writes or shows demo data imports it."""
