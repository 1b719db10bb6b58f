"""fastalign inside other trainers: one module per library, each imported only by those who use it."""
