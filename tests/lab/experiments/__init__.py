from tests.lab.experiments import grey, kills, links
from tests.lab.notebook import Experiment
EXPERIMENTS = {
    experiment.name: experiment
    for module in (kills,  grey,  links)
    for experiment in module.EXPERIMENTS
}
