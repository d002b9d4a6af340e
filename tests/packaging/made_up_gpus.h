// What made_up_gpus.cpp is told and what it notes.
#pragma once

#include <atomic>

// The GPU that is in use.
extern int current;

// How often a kernel was given shared memory.
extern std::atomic<int> asked;

// Whether the last launch may begin before the end of the one that it follows.
extern std::atomic<bool> overlaps;
