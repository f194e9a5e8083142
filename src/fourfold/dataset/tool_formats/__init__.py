"""Tool formats: how tools are described and called in text; one Jinja file each, its stem the value of tool_format."""
