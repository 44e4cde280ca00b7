"""The paper's figures, drawn with matplotlib (extra ``plots``), which is imported on use."""
