"""hybridlab: hybrid sequence models from interchangeable parts."""
