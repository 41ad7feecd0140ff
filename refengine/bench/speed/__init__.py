"""`refengine bench speed`: tokens per second of refengine, and of llama.cpp on the same file in alternating rounds.

`measure` has the vocabulary: sizes, samples, and `EngineUnderTest`, which `ours` and `llamacpp` implement. `process`
runs each engine in a process of its own, `run` plans and alternates, `record` makes the JSON data from which
`report_text`, `report_html` and `baseline` work.
"""
