// The search puts nodes whose id begins with what is typed before those that have it elsewhere in their names. So four
// nodes of this pack would stand before Apply SpargeAttn, which comes first in a workflow too: they step behind it.
import { app } from "../../scripts/app.js"

const PREFIX = "SpargeAttn"
const BEGINS = 1, BEHIND = 3.5 // places: 0 the whole name, 1 its beginning, 2 a word of it, 3 a part of it

app.registerExtension({
  name: "SpargeAttn.search",
  beforeRegisterVueAppNodeDefs(definitions) {
    for (const definition of definitions) {
      const id = definition.name
      if (!id.startsWith(PREFIX)) continue
      // Scores: the place, and after it first, extent and length of the name that was found.
      definition.postProcessSearchScores = ([place, offset, length, ...rest]) =>
        [place === BEGINS && length === id.length ? BEHIND : place, offset, length, ...rest]
    }
  }
})
