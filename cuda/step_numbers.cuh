// What changes from one step of an optimizer to the next, kept on the device so that a captured launch can be replayed.
#pragma once

enum StepNumber { STEP_SIZE, INVERSE_CORRECTION2, DECOUPLED_DECAY };  // places in `numbers`
