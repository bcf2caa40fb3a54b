#pragma once

/// Forgets all copies under way.
void copies_begin_block();
