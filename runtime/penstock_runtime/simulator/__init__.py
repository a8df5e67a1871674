"""A prefill pipeline on a virtual clock: the real scheduler, modelled stages and links. No torch.

    hardware   how long things take: stages, links, noise
    clock      the virtual time
    pipeline   what a plan does to stages and links, and when
    group      a scheduler and its pipeline, talking as a real group does
    explain    one prompt: its plan, its timeline, and how near the optimum it is
    workload   prompts over time: Poisson, or a trace file
    decode     decode workers, by a simple model of their steps
    capacity   how many groups and decode workers a load needs
    published  another system's results, its way to cut prompts, and a fit of its hardware

Every figure that comes out of here is simulated, and says so.
"""
