/**
 * Runs the import script on projects that are described in a JSON file, with as much of QuPath as it uses.
 *
 *     groovy qupath_stand_in.groovy SCRIPT PROJECTS.json
 *
 * PROJECTS.json is a list of {folder, images: [{uri, name, width, height, gone}]}; one that is gone cannot
 * be read. After the output of each comes a line "got [...]": for each image the texts of the files whose objects
 * it got.
 */

import groovy.json.JsonOutput
import groovy.json.JsonSlurper

def loader = new GroovyClassLoader(this.class.classLoader)
loader.parseClass('''
package qupath.lib.common
class GeneralTools {
    static String stripExtension(String name) { return name.replaceFirst(/(\\.ome)?\\.[^.]+$/, "") }
}
''')
loader.parseClass('''
package qupath.lib.io
class PathIO {
    static List readObjectsFromGeoJSON(InputStream stream) { return [new Annotation(stream.getText("UTF-8"))] }
}
class Annotation {
    final String text
    Annotation(String text) { this.text = text }
    String getId() { return text }
    Map getMetadata() { return ["wsiseg.version": "0"] }
}
''')
def qp = loader.parseClass('''
package qupath.lib.scripting
class QP {
    static project
    static Object getProject() { return project }
    static Object getCurrentImageData() { return null }
}
''')

/** An image of a project, its data, its server and its objects all in one. */
class Image {
    Map about
    List objects = []
    List getURIs() { return [URI.create(about.uri)] }
    String getImageName() { return about.name }
    Image readImageData() {
        if (about.gone)
            throw new IOException("no such\nslide")
        return this
    }
    Image getServer() { return this }
    Image getHierarchy() { return this }
    int getWidth() { return about.width }
    int getHeight() { return about.height }
    List getAnnotationObjects() { return objects }
    void removeObjects(Collection some, boolean keep) { objects.removeAll(some) }
    void addObjects(Collection some) { objects.addAll(some) }
    void fireHierarchyChangedEvent(Object source) { }
    void saveImageData(Image data) { about.saved = data.objects.collect { it.text } }
    void close() { }
}

class Project {
    List images
    List getImageList() { return images }
}

def script = loader.parseClass(new File(args[0]))
for (told in new JsonSlurper().parse(new File(args[1]), "UTF-8")) {
    qp.project = new Project(images: told.images.collect { new Image(about: it) })
    def run = script.getDeclaredConstructor().newInstance()
    run.binding = new Binding([args: [told.folder] as String[]])
    run.run()
    println "got " + JsonOutput.toJson(told.images.collect { it.saved ?: [] })
}
