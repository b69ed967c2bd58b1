"""Sources of documents: text, tables, records, dialogues, images, and data sets of other libraries."""
