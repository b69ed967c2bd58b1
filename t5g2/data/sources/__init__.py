"""Sources of documents: text, tables, records, dialogues, images, data sets of other libraries."""
