# host/ holds tests for ComfyUI's own interpreter; test_comfyui.py runs them there and reports their results here.
collect_ignore = ["host"]
