"""How the embedded model of xeco_convert.demo was made and what it can do; not part of the package."""
