"""The commands of ``stratagem``, each in a file of its own."""
